"""Inner optimisers whose hyper-parameters are meta-learned: rates, momenta, preconditioners."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmaml.learners.inner_loop import Start, inner_loop, learned
from jaxmaml.types import Extended, LossFn, MetaLearner, Params

GRANULARITIES = ("scalar", "layer", "parameter")


def learned_optimizer(
    loss_fn: LossFn,
    make_optimizer: Callable[[Any], optax.GradientTransformation],
    hyperparams: Any,
    num_inner_steps: int,
    *,
    per_step: bool = False,
    **options: Any,
) -> MetaLearner:
    """MAML that meta-learns hyper-parameters of the inner optimiser beside the initial parameters.

    Meta-parameters: `Extended(params, {"hyperparams": ...})`. Nothing keeps a hyper-parameter in its
    range: where that matters, learn its logarithm or logit and let `make_optimizer` undo it.

    Args:
        loss_fn: as in `jaxmaml.maml`.
        make_optimizer: `(hyperparams) -> optax transformation`, such as
            `lambda h: optax.sgd(h["lr"], momentum=h["momentum"])`.
        hyperparams: their initial values, a pytree of numbers or arrays, or `(params) -> pytree`.
        num_inner_steps: inner steps in training; with `per_step`, as many values of each are learned.
        per_step: each inner step has values of its own: leaves get a leading axis
            `[num_inner_steps]`. Where more steps are made at test time, the last values are used again.
        options: keyword arguments of `jaxmaml.maml`.

    Raises:
        ValueError: `per_step` without inner steps; when called, for another learner's parameters.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2) / 2
        >>> learner = jaxmaml.learned_optimizer(
        ...     loss_fn, lambda h: optax.sgd(h["lr"]), {"lr": 0.5}, num_inner_steps=1
        ... )
        >>> meta_params = learner.init(jnp.array(0.0))
        >>> task = jaxmaml.Task(support=jnp.ones(4), query=jnp.ones(4))
        >>> grads, _ = jax.grad(learner.loss, has_aux=True)(meta_params, task)
        >>> float(grads.params), float(grads.learned["hyperparams"]["lr"])
        (-0.25, -0.5)
    """
    if per_step and not num_inner_steps:
        raise ValueError("per_step needs at least one inner step; got num_inner_steps=0")

    def init(params: Params) -> Extended:
        first = hyperparams(params) if callable(hyperparams) else hyperparams
        dtype = jnp.result_type(*jax.tree.leaves(params))
        as_array = lambda x: jnp.asarray(x, jnp.result_type(x) if hasattr(x, "dtype") else dtype)
        first = jax.tree.map(as_array, first)
        if per_step:
            first = jax.tree.map(lambda x: jnp.stack([x] * num_inner_steps), first)
        return Extended(params, {"hyperparams": first})

    def start(meta_params, support, state):
        del support
        params, values = learned(meta_params, "hyperparams")
        made = _at_each_step(make_optimizer, values) if per_step else make_optimizer(values)
        return Start(params, made, state)

    return inner_loop(loss_fn, start, num_inner_steps, init=init, **options)


def rates(params: Params, inner_lr: float, granularity: str = "parameter") -> Params:
    """Learning rates for `scale_by_rates`: one in all, one a leaf, or one a number in it.

    Args:
        params: the model's parameters.
        inner_lr: the value of all of them.
        granularity: "scalar", "layer" (one for each array of the parameters) or "parameter".

    Raises:
        ValueError: an unknown granularity.

    Example:
        >>> import jax.numpy as jnp
        >>> rates({"kernel": jnp.ones(2)}, 0.5)["kernel"].tolist()
        [0.5, 0.5]
    """
    check_granularity(granularity)
    if granularity == "scalar":
        return jnp.asarray(inner_lr, jnp.result_type(*jax.tree.leaves(params)))
    shape = lambda leaf: leaf.shape if granularity == "parameter" else ()
    return jax.tree.map(lambda leaf: jnp.full(shape(leaf), inner_lr, leaf.dtype), params)


def check_granularity(granularity: str) -> None:
    """Raises ValueError for a granularity that does not exist."""
    if granularity not in GRANULARITIES:
        raise ValueError(
            f"granularity must be one of {', '.join(GRANULARITIES)}; got {granularity!r}"
        )


def scale_by_rates(rates: Any) -> optax.GradientTransformation:
    """An optax transformation: minus the gradient times a rate, one for all or a pytree of them.

    Args:
        rates: a scalar, or like the parameters with leaves that broadcast against theirs. Where the
            inner loop leaves parameters out, so does this.
    """

    def update(updates, params=None):
        del params
        if jax.tree_util.treedef_is_leaf(jax.tree.structure(rates)):
            return jax.tree.map(lambda u: -rates * u, updates)
        return jax.tree.map(
            lambda u, r: u if isinstance(u, optax.MaskedNode) else -r * u,
            updates, rates, is_leaf=_is_masked,
        )  # fmt: skip

    return optax.stateless(update)


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


class _StepState(NamedTuple):
    count: Any
    opt_state: Any


def _at_each_step(
    make_optimizer: Callable[[Any], optax.GradientTransformation], values: Any
) -> optax.GradientTransformation:
    """An optimiser made anew at every step with that step's values; the last ones serve again."""

    def at(count: Any) -> optax.GradientTransformationExtraArgs:
        row = lambda leaf: leaf[jnp.minimum(count, len(leaf) - 1)]
        return optax.with_extra_args_support(make_optimizer(jax.tree.map(row, values)))

    def init(params: Any) -> _StepState:
        return _StepState(jnp.zeros((), jnp.int32), at(0).init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        updates, opt_state = at(state.count).update(updates, state.opt_state, params, **extra)
        return updates, _StepState(state.count + 1, opt_state)

    return optax.GradientTransformationExtraArgs(init, update)
