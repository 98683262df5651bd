"""Inner optimizers whose hyperparameters are learned: rates, momenta, preconditioners."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax

from jaxmaml import trees
from jaxmaml.checks import check_choice, check_count
from jaxmaml.types import Array, Extended, MetaParams, MetaState, Params, Scalar

Granularity: TypeAlias = Literal["scalar", "layer", "parameter"]
"""One rate in all, one per array of the parameters, or one per number."""


class LearnedOptimizer(NamedTuple):
    """An inner optimizer with hyperparameters that the outer loop learns.

    Every learner that takes an inner optimizer takes one of these in its place, except those that
    differentiate no inner step. `learned_sgd` and `learned_optimizer` make them.

    Attributes:
        init: `(params) -> hyperparams`, a pytree of floating-point arrays. The parameters that the
            inner loop does not adapt are `optax.MaskedNode`.
        make: `(hyperparams) -> optax transformation`.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> optimizer = jaxmaml.LearnedOptimizer(lambda params: jnp.array(0.1), optax.sgd)
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2)
        >>> learner = jaxmaml.maml(loss_fn, optimizer, 1)
        >>> round(float(learner.init(jnp.array(0.0)).learned["hyperparams"]), 3)
        0.1
    """

    init: Callable[[Params], Any]
    make: Callable[[Any], optax.GradientTransformation]


Optimizer: TypeAlias = optax.GradientTransformation | LearnedOptimizer
"""An inner optimizer, as every learner takes it."""


def learned_optimizer(
    make_optimizer: Callable[[Any], optax.GradientTransformation],
    hyperparams: Any,
    *,
    num_steps: int | None = None,
) -> LearnedOptimizer:
    """Returns an inner optimizer whose hyperparameters are learned.

    Nothing keeps a hyperparameter in its range. Where that matters, learn its logarithm or logit and
    let `make_optimizer` undo it.

    Args:
        make_optimizer: `(hyperparams) -> optax transformation`, such as
            `lambda h: optax.sgd(h["lr"], momentum=h["momentum"])`.
        hyperparams: the initial values, a pytree of numbers or arrays, or a function
            `(params) -> pytree`.
        num_steps: the number of inner steps that have values of their own: leaves get a leading axis
            `[num_steps]`, and later steps use the last values again. None shares the values between
            all steps.

    Raises:
        ValueError: `num_steps` is below 1.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2) / 2
        >>> optimizer = jaxmaml.learned_optimizer(lambda h: optax.sgd(h["lr"]), {"lr": 0.5})
        >>> learner = jaxmaml.maml(loss_fn, optimizer, num_inner_steps=1)
        >>> meta_params = learner.init(jnp.array(0.0))
        >>> task = jaxmaml.Task(support=jnp.ones(4), query=jnp.ones(4))
        >>> grads, _ = jax.grad(learner.loss, has_aux=True)(meta_params, task)
        >>> float(grads.params), float(grads.learned["hyperparams"]["lr"])
        (-0.25, -0.5)
    """
    if num_steps is not None:
        check_count("num_steps", num_steps)

    def init(params: Params) -> Any:
        first = hyperparams(params) if callable(hyperparams) else hyperparams
        dtype = jnp.result_type(*jax.tree.leaves(params))
        as_array = lambda x: jnp.asarray(x, jnp.result_type(x) if hasattr(x, "dtype") else dtype)
        first = jax.tree.map(as_array, first)
        return first if num_steps is None else _stacked(first, num_steps)

    make = make_optimizer if num_steps is None else lambda h: _at_each_step(make_optimizer, h)
    return LearnedOptimizer(init, make)


def learned_sgd(
    inner_lr: float, *, granularity: Granularity = "parameter", num_steps: int | None = None
) -> LearnedOptimizer:
    """Returns gradient descent with learned rates, those of Meta-SGD and MAML++.

    Args:
        inner_lr: the initial value of all rates. A rate may become negative.
        granularity: "scalar" learns one rate, "layer" one per array of the parameters, "parameter"
            one per number. Parameters that the inner loop does not adapt have none.
        num_steps: see `learned_optimizer`.

    Raises:
        ValueError: an unknown granularity, or `num_steps` below 1.

    Example:
        CAVIA with learned rates, as in functa (Dupont et al. 2022, arXiv 2201.12204):

        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params["w"] * batch + params["context"]) ** 2)
        >>> learner = jaxmaml.cavia(loss_fn, jaxmaml.learned_sgd(0.1), 3)
        >>> meta_params = learner.init({"w": jnp.ones(2), "context": jnp.zeros(2)})
        >>> {path: rates.tolist() for path, rates in jaxmaml.learned_rates(meta_params).items()}
        {'context': [0.10000000149011612, 0.10000000149011612]}
    """
    check_choice("granularity", granularity, get_args(Granularity))
    first = lambda params: initial_rates(params, inner_lr, granularity)
    return learned_optimizer(scale_by_rates, first, num_steps=num_steps)


def initial_rates(params: Params, inner_lr: float, granularity: Granularity) -> Any:
    """Returns learning rates for `scale_by_rates`, all of one value.

    Args:
        params: the parameters that are adapted.
        inner_lr: the value.
        granularity: see `learned_sgd`.

    Example:
        >>> import jax.numpy as jnp
        >>> initial_rates({"kernel": jnp.ones(2)}, 0.5, "parameter")["kernel"].tolist()
        [0.5, 0.5]
    """
    if granularity == "scalar":
        return jnp.asarray(inner_lr, jnp.result_type(*jax.tree.leaves(params)))
    shape = lambda leaf: jnp.shape(leaf) if granularity == "parameter" else ()
    return jax.tree.map(lambda leaf: jnp.full(shape(leaf), inner_lr, jnp.result_type(leaf)), params)


def scale_by_rates(rates: Any) -> optax.GradientTransformation:
    """Returns an optax transformation: minus the gradient, times a rate.

    Args:
        rates: a scalar for all parameters, or a pytree like those that are adapted, with leaves that
            broadcast against them.

    Example:
        >>> import jax.numpy as jnp
        >>> optimizer = scale_by_rates(jnp.array(0.5))
        >>> optimizer.update(jnp.array([1.0, 2.0]), optimizer.init(None))[0].tolist()
        [-0.5, -1.0]
    """

    def update(updates: Params, params: Params | None = None) -> Params:
        del params
        if jax.tree_util.treedef_is_leaf(jax.tree.structure(rates)):
            return jax.tree.map(lambda update: -rates * update, updates)
        return jax.tree.map(lambda update, rate: -rate * update, updates, rates)

    return optax.stateless(update)


def learned_rates(meta: MetaState | MetaParams) -> dict[str, Array]:
    """Returns the learned hyperparameters of the inner optimizer by their path.

    Args:
        meta: a `MetaState`, or the meta-parameters of a learner with a learned inner optimizer.

    Returns:
        {path: values}. With `granularity="layer"` the path is that of an array of the parameters and
        the value a scalar; per-step values are `[num_steps, ...]`.

    Raises:
        ValueError: the meta-parameters hold no learned inner optimizer.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params["w"] - batch) ** 2)
        >>> learner = jaxmaml.meta_sgd(loss_fn, 2, inner_lr=0.5, granularity="layer", per_step=True)
        >>> meta_state = jaxmaml.init_state(learner, optax.adam(1e-3), {"w": jnp.zeros(3)})
        >>> jaxmaml.learned_rates(meta_state)["w"].tolist()
        [0.5, 0.5]
    """
    meta_params = meta.params if isinstance(meta, MetaState) else meta
    if not isinstance(meta_params, Extended) or "hyperparams" not in meta_params.learned:
        raise ValueError(
            "these meta-parameters hold no learned inner optimizer: use jaxmaml.meta_sgd, or pass "
            "jaxmaml.learned_sgd(...) as the inner optimizer"
        )
    values = meta_params.learned["hyperparams"]
    return dict(zip(trees.leaf_paths(values), jax.tree.leaves(values), strict=True))


def _stacked(values: Any, num_steps: int) -> Any:
    return jax.tree.map(lambda value: jnp.stack([value] * num_steps), values)


class _StepState(NamedTuple):
    """The state of an optimizer with values per step.

    Attributes:
        step: inner steps done, int32 `[]`.
        opt_state: the state of the optimizer that `make_optimizer` returns.
    """

    step: Array
    opt_state: optax.OptState


def _at_each_step(
    make_optimizer: Callable[[Any], optax.GradientTransformation], values: Any
) -> optax.GradientTransformation:
    """An optimizer that is made anew at every step from that step's values, leaves `[num_steps]`."""

    def at(count: Scalar) -> optax.GradientTransformationExtraArgs:
        row = lambda leaf: leaf[jnp.minimum(count, len(leaf) - 1)]
        return optax.with_extra_args_support(make_optimizer(jax.tree.map(row, values)))

    def init(params: Params) -> _StepState:
        return _StepState(jnp.zeros((), jnp.int32), at(0).init(params))

    def update(
        updates: Params, state: _StepState, params: Params | None = None, **extra: Any
    ) -> tuple[Params, _StepState]:
        updates, opt_state = at(state.step).update(updates, state.opt_state, params, **extra)
        return updates, _StepState(state.step + 1, opt_state)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
