"""Schedules over the outer steps: values that a learner looks up at each of them."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxmaml.checks import check_count
from jaxmaml.types import Array, Scalar

QueryWeights: TypeAlias = Callable[[Scalar], Any] | Any
"""The weight of the query loss after each inner step, `[num_inner_steps]`: an array, or a schedule
`outer_step -> array`."""


@dataclasses.dataclass(frozen=True)
class MultiStepWeights:
    """The schedule that `multi_step_weights` returns, `outer_step -> [num_inner_steps]`.

    A learner computes the query losses of all inner steps before the outer step `num_outer_steps`,
    and that of the last one from then on.
    """

    num_inner_steps: int
    num_outer_steps: int

    def __post_init__(self) -> None:
        check_count("num_inner_steps", self.num_inner_steps)
        check_count("num_outer_steps", self.num_outer_steps)

    def __call__(self, outer_step: Scalar) -> Array:
        """Returns the weights at an outer step, `[num_inner_steps]`."""
        progress = jnp.asarray(outer_step) / self.num_outer_steps
        others = jnp.where(progress < 1, jnp.maximum(1 - progress, 0.03), 0) / self.num_inner_steps
        weights = jnp.full(self.num_inner_steps, others)
        return weights.at[-1].set(1 - others * (self.num_inner_steps - 1))


def multi_step_weights(num_inner_steps: int, num_outer_steps: int) -> MultiStepWeights:
    """Returns the schedule of MAML++'s multi-step loss, for `query_weights`.

    The weights are equal at first and move linearly to the last inner step (Antoniou et al. 2019,
    arXiv 1810.09502, section 4). From the outer step `num_outer_steps` on, the loss is that of the
    last step alone, and the query passes of the other steps are not computed. Until then each of the
    others keeps at least 3 % of its initial weight, as in the authors' code; the paper has no such
    floor. The authors move the weights once per epoch, of 500 outer steps; here they move every step.

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
        >>> [round(float(weight), 4) for weight in schedule(60)]
        [0.1, 0.1, 0.1, 0.7]
        >>> schedule(100).tolist()
        [0.0, 0.0, 0.0, 1.0]
    """
    return MultiStepWeights(num_inner_steps, num_outer_steps)


def check_query_weights(query_weights: QueryWeights, num_inner_steps: int) -> None:
    """Raises ValueError unless there are inner steps, and as many constant weights.

    Example:
        >>> check_query_weights([0.0, 1.0], 2)
    """
    if num_inner_steps == 0:
        raise ValueError("query_weights needs at least one inner step; got num_inner_steps=0")
    if isinstance(query_weights, MultiStepWeights):
        _check_shape(jnp.empty(query_weights.num_inner_steps), num_inner_steps)
    elif not callable(query_weights):
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


def with_or_without_weights(
    query_weights: QueryWeights | None,
    outer_step: Scalar,
    weighted: Callable[..., Any],
    last_only: Callable[..., Any],
    *operands: Any,
) -> Any:
    """Returns `weighted(*operands)`, or `last_only(*operands)` where only the last step counts.

    Both are compiled if `outer_step` is traced; each outer step runs one of them.

    Example:
        >>> weights = multi_step_weights(5, 100)
        >>> with_or_without_weights(weights, 100, lambda: "all steps", lambda: "the last step")
        'the last step'
    """
    if query_weights is None:
        return last_only(*operands)
    if not isinstance(query_weights, MultiStepWeights):
        return weighted(*operands)
    moves = outer_step < query_weights.num_outer_steps
    if isinstance(moves, Tracer):
        return jax.lax.cond(moves, weighted, last_only, *operands)
    return weighted(*operands) if moves else last_only(*operands)


def _check_shape(weights: Array, num_inner_steps: int) -> None:
    if weights.shape != (num_inner_steps,):
        raise ValueError(
            f"query_weights must be [num_inner_steps] = [{num_inner_steps}]; "
            f"got {list(weights.shape)}"
        )
