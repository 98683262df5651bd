"""The learners with an inner loop: each algorithm says what the loop starts from."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxmaml import inner, trees
from jaxmaml.adjoints import Adjoint, Implicit, check_adjoint
from jaxmaml.checks import check_count
from jaxmaml.learners.hyperparams import LearnedOptimizer, Optimizer
from jaxmaml.mixed_mode import check_scalar
from jaxmaml.schedules import (
    QueryWeights,
    check_query_weights,
    weights_at,
    with_or_without_weights,
)
from jaxmaml.types import (
    Array,
    AtStep,
    Batch,
    Extended,
    Info,
    LossFn,
    Mask,
    MetaLearner,
    MetaParams,
    Params,
    Scalar,
    State,
    Task,
    View,
    as_stateful,
    carries_state,
    in_form_of,
)

HYPERPARAMS = "hyperparams"
"""The name under which the hyperparameters of a `LearnedOptimizer` are learned."""


class Start(NamedTuple):
    """The point that the inner loop of one task starts from.

    Attributes:
        params: the parameters before the first step.
        state: the state of the loss function.
        penalty: `(adapted) -> scalar`, added to the support loss; None adds nothing.
    """

    params: Params
    state: State
    penalty: Callable[[Params], Array] | None = None


StartFn: TypeAlias = Callable[[Params, Mapping[str, Any], Batch, State], Start]
"""`(params, learned, support, state) -> Start`, where `learned` is what `init_learned` names. All
that it computes is differentiated."""


def plain_start(params: Params, learned: Mapping[str, Any], support: Batch, state: State) -> Start:
    """Returns MAML's start: the initial parameters themselves."""
    del learned, support
    return Start(params, state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """The options of every learner with an inner loop; `jaxmaml.maml` documents them.

    Raises:
        TypeError: `adjoint` is not an adjoint.
    """

    adjoint: Adjoint = inner.EXACT
    mask: Mask = None
    query_loss_fn: LossFn | None = None
    test_loss_fn: LossFn | None = None
    query_weights: QueryWeights | None = None
    refresh_state: bool = False
    at_step: AtStep = inner.fold_keys

    def __post_init__(self) -> None:
        check_adjoint(self.adjoint)


def loop_options(learner: str, options: Mapping[str, Any], **own: Any) -> LoopOptions:
    """Returns the options of a learner: its own, and those that its user gives.

    Args:
        learner: its name, for messages.
        options: keyword arguments of `jaxmaml.maml` that the user gives.
        own: those that the learner sets itself.

    Raises:
        TypeError: the user gives an option that does not exist, or one that the learner sets.
    """
    names = [field.name for field in dataclasses.fields(LoopOptions)]
    for name in options:
        if name in own:
            raise TypeError(
                f"{learner} has its own {name}: leave `{name}` out, or use jaxmaml.maml"
            )
        if name not in names:
            allowed = ", ".join(name for name in names if name not in own)
            raise TypeError(f"{learner} takes no option {name!r}; its options are {allowed}")
    return LoopOptions(**options, **own)


def inner_loop(
    loss_fn: LossFn,
    optimizer: Optimizer,
    num_inner_steps: int,
    options: LoopOptions,
    *,
    start: StartFn = plain_start,
    init_learned: Mapping[str, Callable[[Params], Any]] | None = None,
) -> MetaLearner:
    """Returns a learner that adapts by gradient steps from `start`, and scores on the query.

    Args:
        loss_fn, optimizer, num_inner_steps: as in `jaxmaml.maml`.
        options: the other arguments of `jaxmaml.maml`.
        start: what the loop starts from. Defaults to the meta-parameters themselves.
        init_learned: `(params) -> initial value` of what the algorithm learns beside the parameters,
            by name.
    """
    number = check_count("num_inner_steps", num_inner_steps, minimum=0)
    if options.refresh_state and not carries_state(loss_fn):
        raise ValueError(
            "refresh_state=True needs a loss that carries state: mark it with jaxmaml.with_state"
        )
    if options.query_weights is not None:
        check_query_weights(options.query_weights, number)
    if any(isinstance(adjoint, Implicit) for adjoint in options.adjoint.all()):
        refuse_learned(optimizer, "a learner with the adjoint Implicit()")
    algorithm = Algorithm(loss_fn, optimizer, number, options, start, init_learned or {})
    return MetaLearner(
        init=functools.partial(_init, algorithm),
        adapt=functools.partial(_adapt, algorithm),
        trace=functools.partial(_trace, algorithm),
        loss=functools.partial(_loss, algorithm),
    )


def split_learned(
    meta_params: MetaParams, names: tuple[str, ...]
) -> tuple[Params, Mapping[str, Any]]:
    """Returns the initial parameters, and what else is learned, by name.

    Args:
        meta_params: the meta-parameters of a learner.
        names: what that learner learns beside the parameters.

    Raises:
        ValueError: they are the meta-parameters of another learner.
    """
    params, learned = meta_params, {}
    if isinstance(meta_params, Extended):
        params, learned = meta_params
    if set(learned) == set(names):
        return params, learned
    found, wanted = (f"{sorted(x)}" if x else "nothing else" for x in (learned, names))
    raise ValueError(
        f"these meta-parameters belong to another learner: beside the parameters they hold {found}, "
        f"and this learner learns {wanted}; use what its own init(params) returns"
    )


def refuse_learned(optimizer: Optimizer, learner: str) -> None:
    """Raises ValueError for a learned optimizer in a learner that differentiates no inner step."""
    if isinstance(optimizer, LearnedOptimizer):
        raise ValueError(
            f"{learner} differentiates no inner step, so hyperparameters of the inner optimizer have "
            "no meta-gradient: pass an optax optimizer"
        )


class Algorithm(NamedTuple):
    """A learner with an inner loop, as data; see `inner_loop`."""

    loss_fn: LossFn
    optimizer: Optimizer
    num_inner_steps: int
    options: LoopOptions
    start: StartFn
    init_learned: Mapping[str, Callable[[Params], Any]]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of what is learned beside the parameters."""
        own = tuple(self.init_learned)
        return (*own, HYPERPARAMS) if isinstance(self.optimizer, LearnedOptimizer) else own

    @property
    def test_loss_fn(self) -> LossFn:
        return self.loss_fn if self.options.test_loss_fn is None else self.options.test_loss_fn

    @property
    def query_loss_fn(self) -> LossFn:
        return self.loss_fn if self.options.query_loss_fn is None else self.options.query_loss_fn


def algorithm_of(learner: MetaLearner) -> Algorithm:
    """Returns what `inner_loop` made a learner from, for diagnostics.

    Raises:
        ValueError: the learner was not made by `inner_loop`.
    """
    adapt = learner.adapt
    if isinstance(adapt, functools.partial) and adapt.args[:1]:
        algorithm = adapt.args[0]
        if isinstance(algorithm, Algorithm):
            return algorithm
    raise ValueError("the learner has no inner loop of jaxmaml, so its options are not known")


def in_training(learner: MetaLearner) -> MetaLearner:
    """Returns a learner whose `adapt` and `trace` use the loss of the training, not `test_loss_fn`."""
    if getattr(learner.trace, "func", None) is not _trace:
        return learner
    algorithm = algorithm_of(learner)
    options = dataclasses.replace(algorithm.options, test_loss_fn=None)
    algorithm = algorithm._replace(options=options)
    adapt, trace = (functools.partial(make, algorithm) for make in (_adapt, _trace))
    return learner._replace(adapt=adapt, trace=trace)


def has_query_loss(learner: MetaLearner) -> bool:
    """Returns whether the meta-loss is the query loss after the inner loop, as `inner_loop` makes it."""
    return getattr(learner.loss, "func", None) is _loss


def _init(algorithm: Algorithm, params: Params) -> MetaParams:
    learned = {name: init(params) for name, init in algorithm.init_learned.items()}
    if isinstance(algorithm.optimizer, LearnedOptimizer):
        flags = trees.is_adapted(params, algorithm.options.mask)
        learned[HYPERPARAMS] = algorithm.optimizer.init(trees.partition(params, flags)[0])
    return Extended(params, learned) if learned else params


def _adapt(
    algorithm: Algorithm,
    meta_params: MetaParams,
    support: Batch,
    *,
    state: State = (),
    num_inner_steps: int | None = None,
) -> tuple[Params, Info]:
    problem = begin(algorithm, algorithm.test_loss_fn, meta_params, support, state)
    adapted, info = inner.adapt(
        problem.loss_fn, problem.start.params, support, problem.optimizer,
        algorithm.num_inner_steps if num_inner_steps is None else num_inner_steps,
        state=problem.start.state, **problem.options(algorithm.options.adjoint.after_training()),
    )  # fmt: skip
    state = _refreshed(algorithm, algorithm.test_loss_fn, adapted, support, info.state)
    return adapted, info._replace(state=state, opt_state=None)


def _trace(
    algorithm: Algorithm,
    meta_params: MetaParams,
    support: Batch,
    view: View,
    *,
    state: State = (),
    num_inner_steps: int | None = None,
) -> Any:
    problem = begin(algorithm, algorithm.test_loss_fn, meta_params, support, state)

    def refreshed_view(adapted: Params, state: State) -> Any:
        state = _refreshed(algorithm, algorithm.test_loss_fn, adapted, support, state)
        return view(adapted, state)

    return inner.trace(
        problem.loss_fn, problem.start.params, support, refreshed_view, problem.optimizer,
        algorithm.num_inner_steps if num_inner_steps is None else num_inner_steps,
        state=problem.start.state, **problem.options(algorithm.options.adjoint.after_training()),
    )  # fmt: skip


def _loss(
    algorithm: Algorithm,
    meta_params: MetaParams,
    task: Task,
    *,
    step: Scalar = 0,
    state: State = (),
) -> tuple[Array, Info]:
    options = algorithm.options

    def with_adjoint(adjoint: Adjoint, *operands: Any) -> tuple[Array, Info]:
        weighted, last_only = (
            functools.partial(loss, algorithm, adjoint) for loss in (_weighted_loss, _last_loss)
        )
        return with_or_without_weights(options.query_weights, step, weighted, last_only, *operands)

    return options.adjoint.at_outer_step(step, with_adjoint, meta_params, task, step, state)


def _last_loss(
    algorithm: Algorithm,
    adjoint: Adjoint,
    meta_params: MetaParams,
    task: Task,
    step: Scalar,
    state: State,
) -> tuple[Array, Info]:
    """The query loss of the adapted parameters."""
    del step
    problem = begin(algorithm, algorithm.loss_fn, meta_params, task.support, state)
    adapted, info = inner.adapt(
        problem.loss_fn, problem.start.params, task.support, problem.optimizer,
        algorithm.num_inner_steps, state=problem.start.state, **problem.options(adjoint),
    )  # fmt: skip
    query_loss, state = query_loss_of(algorithm, task, adapted, info.state)
    return query_loss, Info(query_loss, info.inner_losses, state)


def _weighted_loss(
    algorithm: Algorithm,
    adjoint: Adjoint,
    meta_params: MetaParams,
    task: Task,
    step: Scalar,
    state: State,
) -> tuple[Array, Info]:
    """The weighted sum of the query losses after every inner step."""
    problem = begin(algorithm, algorithm.loss_fn, meta_params, task.support, state)
    # Without the checkpoint, the query pass of every step would be stored until the backward pass.
    view = jax.checkpoint(functools.partial(query_loss_of, algorithm, task))
    (query_losses, states), info = inner.record(
        problem.loss_fn, problem.start.params, task.support, view, problem.optimizer,
        algorithm.num_inner_steps, state=problem.start.state, **problem.options(adjoint),
    )  # fmt: skip

    weights = weights_at(algorithm.options.query_weights, step, algorithm.num_inner_steps)
    # At the default precision, an accelerator would round the losses.
    loss = jnp.dot(weights.astype(query_losses.dtype), query_losses, precision="highest")
    last_state = jax.tree.map(lambda leaf: leaf[-1], states)
    return loss, Info(query_losses[-1], info.inner_losses, last_state)


class Problem(NamedTuple):
    """The inner problem of one task.

    Attributes:
        loss_fn: the support loss, with the penalty of the start.
        optimizer: the inner optimizer.
        start: what the loop starts from.
        mask, at_step: see `inner.adapt`.
    """

    loss_fn: LossFn
    optimizer: optax.GradientTransformation
    start: Start
    mask: Mask
    at_step: AtStep

    def options(self, adjoint: Adjoint) -> dict[str, Any]:
        """The keyword arguments of `inner.adapt` and its siblings."""
        return {"adjoint": adjoint, "mask": self.mask, "at_step": self.at_step}


def begin(
    algorithm: Algorithm, loss_fn: LossFn, meta_params: MetaParams, support: Batch, state: State
) -> Problem:
    """Returns the inner loop of one task at the given meta-parameters."""
    params, learned = split_learned(meta_params, algorithm.names)
    start = algorithm.start(params, learned, support, reset_steps(state))
    optimizer = algorithm.optimizer
    if isinstance(optimizer, LearnedOptimizer):
        optimizer = optimizer.make(learned[HYPERPARAMS])
    loss_fn = _with_penalty(loss_fn, start.penalty)
    return Problem(loss_fn, optimizer, start, algorithm.options.mask, algorithm.options.at_step)


def reset_steps(state: State) -> State:
    """Returns the state as a task starts with it: integer leaves called "inner_step" are 0.

    They count the inner steps of a task, as `norm="per_step"` does, whatever the outer step before
    counted.

    Example:
        >>> import jax.numpy as jnp
        >>> counted = {"norm": {"inner_step": jnp.array(3), "mean": jnp.array(0.5)}}
        >>> reset_steps(counted)["norm"]["inner_step"].item()
        0
    """

    def reset(path: Any, leaf: Any) -> Any:
        name = trees.leaf_path(path).rpartition("/")[-1]
        is_count = name == "inner_step" and jnp.issubdtype(jnp.result_type(leaf), jnp.integer)
        return jnp.zeros_like(leaf) if is_count else leaf

    return jax.tree.map_with_path(reset, state)


def _with_penalty(loss_fn: LossFn, penalty: Callable[[Params], Array] | None) -> LossFn:
    if penalty is None:
        return loss_fn

    def penalized(params: Params, batch: Batch, state: State) -> tuple[Array, State]:
        loss, state = as_stateful(loss_fn)(params, batch, state)
        check_scalar(loss)
        return loss + penalty(params).astype(loss.dtype), state

    return in_form_of(loss_fn, penalized)


def _refreshed(
    algorithm: Algorithm, loss_fn: LossFn, adapted: Params, support: Batch, state: State
) -> State:
    """The state after one more pass over the support, if the options ask for it."""
    if not algorithm.options.refresh_state:
        return state
    return as_stateful(loss_fn)(adapted, support, state)[1]


def query_loss_of(
    algorithm: Algorithm, task: Task, adapted: Params, state: State
) -> tuple[Array, State]:
    """Returns (query loss, state) of adapted parameters."""
    state = _refreshed(algorithm, algorithm.loss_fn, adapted, task.support, state)
    query_loss, state = as_stateful(algorithm.query_loss_fn)(adapted, task.query, state)
    check_scalar(query_loss)
    return query_loss, state
