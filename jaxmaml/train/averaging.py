"""A moving average of the parameters along the outer steps, kept in the outer optimiser's state."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from jaxmaml.types import Array, MetaParams, MetaState


class AveragingState(NamedTuple):
    """The state of the optimiser itself, and the average.

    Attributes:
        opt_state: that of the optimiser.
        average: like the parameters.
        num_steps: int32, outer steps averaged over.
    """

    opt_state: optax.OptState
    average: MetaParams
    num_steps: Array


def with_average(
    optimizer: optax.GradientTransformation, decay: float
) -> optax.GradientTransformation:
    """`optimizer`, whose state also follows the parameters with an exponential moving average.

    A constant outer rate leaves the last parameters noisy; their average over the last
    1 / (1 - decay) steps is less so (Polyak and Juditsky 1992). The updates are those of
    `optimizer`: training does not change. The decay grows from 0.1 by (1 + t) / (10 + t), so that
    a short run's average is not the initial parameters'.

    Args:
        optimizer: the outer optimiser.
        decay: 0 keeps no average.
    """
    if decay == 0:
        return optimizer

    def init(params: Any) -> AveragingState:
        return AveragingState(optimizer.init(params), params, jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AveragingState]:
        updates, opt_state = optimizer.update(updates, state.opt_state, params)
        stepped = optax.apply_updates(params, updates)
        step_size = 1 - jnp.minimum(decay, (1 + state.num_steps) / (10 + state.num_steps))
        average = optax.incremental_update(stepped, state.average, step_size)
        return updates, AveragingState(opt_state, average, state.num_steps + 1)

    return optax.GradientTransformation(init, update)


def scored_params(meta_state: MetaState) -> MetaParams:
    """The parameters to score: the average where the optimiser keeps one, else the last."""
    opt_state = meta_state.opt_state
    return opt_state.average if isinstance(opt_state, AveragingState) else meta_state.params
