"""Padded examples: rows of a batch that are there for its shape only, marked by a zero weight."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmaml.types import Array


def blank_padding(tree: Any, weights: Array) -> Any:
    """Replaces the examples of zero weight by zeros.

    A weighted sum alone does not keep padding out: zero times NaN is NaN, in the value and in the
    gradient. Zeros are safe in both.

    Args:
        tree: pytree of arrays, leaves `[num_examples, ...]`.
        weights: `[num_examples]`.

    Returns:
        The tree, with the same shapes and types.

    Raises:
        ValueError: if weights has not one entry per example.
    """
    present = jnp.asarray(weights) != 0

    def blank(leaf: Any) -> Array:
        leaf = jnp.asarray(leaf)
        if present.ndim != 1 or leaf.shape[:1] != present.shape:
            raise ValueError(
                f"weights must be [num_examples], one for each example of an array of shape "
                f"{leaf.shape}, got shape {present.shape}"
            )
        column = present.reshape((-1,) + (1,) * (leaf.ndim - 1))
        return jnp.where(column, leaf, jnp.zeros_like(leaf))

    return jax.tree.map(blank, tree)
