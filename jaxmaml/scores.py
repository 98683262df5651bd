"""Scores of predictions: the computations that metrics of logits and of models share.

Shapes and types are always checked. Values are checked where they are known; where they are traced,
as under `jit`, a wrong one makes the score NaN.
"""

import jax.numpy as jnp

from jaxmaml.checks import check_class_shapes, check_floating, checked_weights, zero_where_class
from jaxmaml.types import Array


def accuracy(logits: Array, targets: Array, weights: Array | None = None) -> Array:
    """Returns the fraction of examples whose largest logit is the target's.

    Args:
        logits: `[num_examples, way]`, or `[num_examples, ..., way]`, floating-point.
        targets: class indices in 0..way-1, integers `[num_examples]`, or `[num_examples, ...]`;
            further axes are averaged within an example.
        weights: `[num_examples]`, 0 or more, 0 for padding; None counts each example once.

    Returns:
        A scalar in 0..1. It is NaN if a logit of an example that counts is not finite, because
        argmax would score a diverged model as right on one class; if no example counts; and if a
        target or a weight is wrong and traced.

    Raises:
        TypeError: targets that are not integers, or logits that are not floating-point.
        ValueError: shapes that do not fit; a target outside 0..way-1 of an example that counts, or a
            weight that is negative or not finite, unless they are traced.

    Example:
        >>> import jax.numpy as jnp
        >>> float(accuracy(jnp.array([[2.0, 1.0], [0.0, 3.0]]), jnp.array([0, 0])))
        0.5
    """
    logits, targets = jnp.asarray(logits), jnp.asarray(targets)
    check_floating("logits", logits)
    check_class_shapes(logits, targets)
    counted = jnp.ones(logits.shape[0], bool)
    # In half precision, sums of weights would overflow and means be rounded.
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    if weights is not None:
        weights, zero = checked_weights(weights, len(targets), dtype)
        counted = weights > 0
        targets = jnp.where(_column(counted, targets.ndim), targets, 0)
        logits = logits + zero
    logits = logits + zero_where_class(targets, logits.shape[-1], logits.dtype)[..., None]
    # Per example: the share of correct predictions, and whether all logits are finite.
    hits = jnp.asarray(logits.argmax(-1) == targets, dtype)
    correct = hits.mean(axis=tuple(range(1, hits.ndim)))
    finite = jnp.all(jnp.isfinite(logits), axis=tuple(range(1, logits.ndim)))
    share = jnp.average(jnp.where(counted, correct, 0), weights=weights)
    return jnp.where(jnp.all(finite | ~counted), share, jnp.nan)


def _column(per_example: Array, ndim: int) -> Array:
    return per_example.reshape((-1,) + (1,) * (ndim - 1))
