"""Scores of predictions: the computations that metrics of logits and of models share."""

import jax.numpy as jnp

from jaxmaml.types import Array


def accuracy(logits: Array, targets: Array, weights: Array | None = None) -> Array:
    """Returns the fraction of examples whose largest logit is the target's.

    Args:
        logits: `[num_examples, way]`, or `[num_examples, ..., way]`.
        targets: class indices `[num_examples]`, or `[num_examples, ...]`; further axes are averaged
            within an example.
        weights: `[num_examples]`, 0 for padding; None counts each example once.

    Returns:
        A scalar in 0..1. It is NaN if a logit of an example that counts is not finite, because
        argmax would score a diverged model as right on one class.

    Example:
        >>> import jax.numpy as jnp
        >>> float(accuracy(jnp.array([[2.0, 1.0], [0.0, 3.0]]), jnp.array([0, 0])))
        0.5
    """
    counted = jnp.ones(logits.shape[0], bool) if weights is None else weights > 0
    # Per example: the share of correct predictions, and whether all logits are finite.
    hits = jnp.asarray(logits.argmax(-1) == targets, logits.dtype)
    correct = hits.mean(axis=tuple(range(1, hits.ndim)))
    finite = jnp.all(jnp.isfinite(logits), axis=tuple(range(1, logits.ndim)))
    share = jnp.average(jnp.where(counted, correct, 0), weights=weights)
    return jnp.where(jnp.all(finite | ~counted), share, jnp.nan)
