"""A moving average of the parameters along the outer steps, in the state of the outer optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmaml import trees
from jaxmaml.types import Array, MetaParams, MetaState


class AveragingState(NamedTuple):
    """The state of the optimizer itself, and the average.

    Attributes:
        opt_state: the state of the optimizer.
        average: like the parameters, in float32 or higher.
        num_steps: the outer steps averaged over, int32 `[]`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> state = with_average(optax.sgd(1.0), 0.99).init(jnp.array(2.0))
        >>> float(state.average), int(state.num_steps)
        (2.0, 0)
    """

    opt_state: optax.OptState
    average: MetaParams
    num_steps: Array


def with_average(
    optimizer: optax.GradientTransformation, decay: float
) -> optax.GradientTransformation:
    """Returns `optimizer` with an exponential moving average of the parameters in its state.

    A constant outer rate leaves the last parameters noisy; their average over the last
    1 / (1 - decay) steps is less so (Polyak and Juditsky 1992). The updates are those of
    `optimizer`, so training does not change. The decay grows from 0.1 as (1 + t) / (10 + t), so that
    the average of a short run is not the initial parameters.

    Args:
        optimizer: the outer optimizer.
        decay: at least 0 and below 1; 0 keeps no average.

    Raises:
        ValueError: the decay is out of its range.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> optimizer = with_average(optax.sgd(1.0), 0.99)
        >>> params = jnp.array(0.0)
        >>> _, state = optimizer.update(jnp.array(-1.0), optimizer.init(params), params)
        >>> round(float(state.average), 3)  # 0.9 of the way to the new parameters
        0.9
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be at least 0 and below 1; got {decay!r}")
    if decay == 0:
        return optimizer

    optimizer = optax.with_extra_args_support(optimizer)

    # In half precision, the small steps of an average would be rounded away.
    def init(params: MetaParams) -> AveragingState:
        average = trees.in_float32(params)
        return AveragingState(optimizer.init(params), average, jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, AveragingState]:
        updates, opt_state = optimizer.update(updates, state.opt_state, params, **extra)
        stepped = trees.in_float32(optax.apply_updates(params, updates))
        step_size = 1 - jnp.minimum(decay, (1 + state.num_steps) / (10 + state.num_steps))
        average = optax.incremental_update(stepped, state.average, step_size)
        average = jax.tree.map(lambda new, old: new.astype(old.dtype), average, state.average)
        return updates, AveragingState(opt_state, average, state.num_steps + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def averaged(meta_state: MetaState) -> MetaState:
    """Returns the state to evaluate: with the average as parameters, if the optimizer keeps one.

    Args:
        meta_state: the state of a run whose outer optimizer may be a `with_average`.

    Raises:
        ValueError: the optimizer keeps an average within another transformation.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> learner = jaxmaml.maml(lambda params, batch: jnp.mean(params**2), optax.sgd(0.1), 1)
        >>> meta_state = jaxmaml.init_state(learner, with_average(optax.sgd(0.1), 0.9), jnp.ones(2))
        >>> averaged(meta_state).params.tolist()
        [1.0, 1.0]
    """
    opt_state = meta_state.opt_state
    if not isinstance(opt_state, AveragingState):
        is_average = lambda node: isinstance(node, AveragingState)
        if any(map(is_average, jax.tree.leaves(opt_state, is_leaf=is_average))):
            raise ValueError(
                "with_average must be the outermost part of the outer optimizer: what is around it "
                "changes the parameters, and the average does not know it"
            )
        return meta_state
    in_type_of = lambda mean, like: mean.astype(jnp.result_type(like))
    return meta_state._replace(
        params=jax.tree.map(in_type_of, opt_state.average, meta_state.params)
    )
