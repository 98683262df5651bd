"""Schedules over the outer steps: values that a learner looks up at each of them."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax.numpy as jnp

from jaxmaml.checks import check_count
from jaxmaml.types import Array, Scalar

QueryWeights: TypeAlias = Callable[[Scalar], Any] | Any
"""The weight of the query loss after each inner step, `[num_inner_steps]`: an array, or a schedule
`outer_step -> array`."""


def multi_step_weights(num_inner_steps: int, num_outer_steps: int) -> Callable[[Scalar], Array]:
    """Returns the schedule of MAML++'s multi-step loss, for `query_weights`.

    The weights are equal at first and move linearly to the last inner step, within
    `num_outer_steps`. The others keep 3 % of their initial weight (Antoniou et al. 2019, arXiv
    1810.09502, section 4, and the authors' code).

    Args:
        num_inner_steps: the inner steps in training.
        num_outer_steps: the outer steps over which the weights move.

    Returns:
        A function `outer_step -> [num_inner_steps]`; the weights add up to 1.

    Raises:
        ValueError: a number below 1.

    Example:
        >>> schedule = multi_step_weights(4, 100)
        >>> schedule(0).tolist()
        [0.25, 0.25, 0.25, 0.25]
        >>> [round(float(weight), 4) for weight in schedule(100)]
        [0.0075, 0.0075, 0.0075, 0.9775]
    """
    check_count("num_inner_steps", num_inner_steps)
    check_count("num_outer_steps", num_outer_steps)

    def schedule(outer_step: Scalar) -> Array:
        progress = jnp.asarray(outer_step) / num_outer_steps
        others = jnp.maximum(1 - progress, 0.03) / num_inner_steps
        weights = jnp.full(num_inner_steps, others)
        return weights.at[-1].set(1 - others * (num_inner_steps - 1))

    return schedule


def check_query_weights(query_weights: QueryWeights, num_inner_steps: int) -> None:
    """Raises ValueError unless there are inner steps, and as many constant weights.

    Example:
        >>> check_query_weights([0.0, 1.0], 2)
    """
    if num_inner_steps == 0:
        raise ValueError("query_weights needs at least one inner step; got num_inner_steps=0")
    if not callable(query_weights):
        _check_shape(jnp.asarray(query_weights), num_inner_steps)


def weights_at(query_weights: QueryWeights, outer_step: Scalar, num_inner_steps: int) -> Array:
    """Returns the weights at an outer step, `[num_inner_steps]`.

    Raises:
        ValueError: the schedule returns another shape.

    Example:
        >>> weights_at(lambda step: jnp.array([0.5, 0.5]) * step, 2, 2).tolist()
        [1.0, 1.0]
    """
    weights = query_weights(outer_step) if callable(query_weights) else query_weights
    weights = jnp.asarray(weights)
    _check_shape(weights, num_inner_steps)
    return weights


def _check_shape(weights: Array, num_inner_steps: int) -> None:
    if weights.shape != (num_inner_steps,):
        raise ValueError(
            f"query_weights must be [num_inner_steps] = [{num_inner_steps}]; "
            f"got {list(weights.shape)}"
        )
