"""Padded examples: rows that only fill up the shape of a batch, marked by a weight of zero."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmaml.types import Array


def blank_padding(tree: Any, weights: Array) -> Any:
    """Returns a pytree of arrays with zeros in place of the examples of weight zero.

    A weighted sum alone does not remove padding: zero times NaN is NaN, in the value and in the
    gradient. Zeros are safe in both.

    Args:
        tree: a pytree of arrays, leaves `[num_examples, ...]`.
        weights: `[num_examples]`.

    Returns:
        A pytree with the same structure, shapes and dtypes.

    Raises:
        ValueError: weights does not have one entry per example.

    Example:
        >>> blank_padding(jnp.array([1.0, jnp.nan]), jnp.array([1.0, 0.0])).tolist()
        [1.0, 0.0]
    """
    present = jnp.asarray(weights) != 0

    def blank(leaf: Any) -> Array:
        leaf = jnp.asarray(leaf)
        if present.ndim != 1 or leaf.shape[:1] != present.shape:
            raise ValueError(
                f"weights must be [num_examples], one per example of an array of shape "
                f"{leaf.shape}, got shape {present.shape}"
            )
        column = present.reshape((-1,) + (1,) * (leaf.ndim - 1))
        return jnp.where(column, leaf, jnp.zeros_like(leaf))

    return jax.tree.map(blank, tree)
