"""Max-pooling whose derivatives are fast, and the order in which to normalize and to pool.

On a CPU the pooling is the bottleneck of a pooled network. A maximum over strided slices has a
derivative of interior pads, which XLA runs as scalar code. Here each window has a mask with the place
of its first maximum, and the mask selects from a view `[..., rows, window, columns, window, channels]`:
the derivatives of every order are selections, too.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmaml.checks import check_count
from jaxmaml.types import Array


class Norm(Protocol):
    """A normalization that `make_norm` returns."""

    def normalizer(self, inputs: Array, weights: Array | None = None) -> Callable[[Array], Array]:
        """Returns the function that normalizes the inputs, with their statistics."""
        ...


def max_pool(inputs: Array, window: int = 2) -> Array:
    """Returns the maximum over windows that do not overlap.

    Rows and columns that fill no whole window are dropped. If several entries of a window attain
    the maximum, the gradient goes to the first of them.

    Args:
        inputs: `[..., height, width, channels]`.
        window: the side of the square window, and the stride.

    Returns:
        `[..., height // window, width // window, channels]`.

    Raises:
        TypeError: window is not an integer.
        ValueError: window is less than 1 or larger than the image.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmaml import nn
        >>> nn.max_pool(jnp.arange(15.0).reshape(1, 3, 5, 1))[0, ..., 0].tolist()
        [[6.0, 8.0]]
    """
    inputs = jnp.asarray(inputs)
    return _pool_by(inputs, window)(inputs)


def normalize_and_pool(
    branches: Sequence[tuple[Array, Norm]],
    weights: Array | None = None,
    *,
    activation: Callable[[Array], Array] = jax.nn.relu,
    window: int = 2,
) -> Array:
    """Returns `max_pool(activation(norm(inputs, weights)))`, normalized after the pooling.

    The statistics are those of all the inputs, but only the largest entry of each window is normalized
    and goes through the activation. So the derivatives touch a quarter of the numbers. Of equal entries
    the first is taken, as `max_pool` does, and the sign of a scale does not matter.

    Args:
        branches: pairs of inputs `[num_examples, height, width, channels]` and a normalization, as
            `make_norm` returns it. What is pooled is the sum of the normalized inputs; a residual block
            has two branches.
        weights: `[num_examples]`, how much each example counts in the normalization.
        activation: a function of one number that does not decrease, applied to every entry.
        window: as in `max_pool`.

    Returns:
        `[num_examples, height // window, width // window, channels]`.

    Raises:
        TypeError: window is not an integer.
        ValueError: window is less than 1 or larger than the image.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmaml import nn
        >>> images = jnp.arange(16.0).reshape(1, 4, 4, 1)
        >>> outputs = nn.normalize_and_pool([(images, nn.make_norm("transductive", 1))])
        >>> outputs.round(1)[0, ..., 0].tolist()
        [[0.0, 0.0], [1.2, 1.6]]
    """
    # Without the barrier XLA computes what stands between a convolution and its uses, such as adding a
    # bias, once per use: for the statistics, for the comparisons and for their derivatives.
    images = [lax.optimization_barrier(jnp.asarray(inputs)) for inputs, _ in branches]
    normalizers = [
        norm.normalizer(inputs, weights)
        for inputs, (_, norm) in zip(images, branches, strict=True)
    ]

    def normalized(parts: Sequence[Array]) -> Array:
        normed = [f(part) for f, part in zip(normalizers, parts, strict=True)]
        return functools.reduce(operator.add, normed)

    pool = _pool_by(normalized(images), window)
    return activation(normalized([pool(inputs) for inputs in images]))


def _pool_by(keys: Array, window: int) -> Callable[[Array], Array]:
    """Returns the pooling that takes from each window the entry whose key is the largest.

    Args:
        keys: `[..., height, width, channels]`; no derivative passes through them.
        window: the side of the square window, and the stride.

    Returns:
        A function from `[..., height, width, channels]` to
        `[..., height // window, width // window, channels]`.
    """
    window = _check_window(keys, window)
    if window == 1:
        return lambda values: values
    is_first_largest = _is_first_largest(_windows(lax.stop_gradient(keys), window))

    def pool(values: Array) -> Array:
        # A selection, because a product with a mask of zeros would make NaN of infinite entries.
        selected = jnp.where(is_first_largest, _windows(values, window), jnp.zeros((), values.dtype))
        return selected.sum(axis=(-4, -2), dtype=values.dtype)

    return pool


def _windows(values: Array, window: int) -> Array:
    """Returns a view `[..., rows, window, columns, window, channels]` of whole windows."""
    *leading, height, width, channels = values.shape
    rows, columns = height // window, width // window
    whole = values[..., : rows * window, : columns * window, :]
    return whole.reshape(*leading, rows, window, columns, window, channels)


def _is_first_largest(keys: Array) -> Array:
    """Returns where each window has its first maximum, like `keys`; a NaN is larger than any number."""
    # Comparisons one after another rather than for equality with the maximum: a compiler that computes
    # the keys again, with another rounding, may find no entry equal to it (seen on XLA CPU).
    window = keys.shape[-2]
    dtype = np.min_scalar_type(window**2)
    largest = keys[..., 0, :, 0, :]
    place = jnp.zeros(largest.shape, dtype)
    for i in range(1, window**2):
        other = keys[..., i // window, :, i % window, :]
        stays = (largest >= other) | jnp.isnan(largest)
        largest = jnp.where(stays, largest, other)
        place = jnp.where(stays, place, jnp.asarray(i, dtype))
    places = jnp.arange(window**2, dtype=dtype).reshape(window, 1, window, 1)
    return jnp.expand_dims(place, (-4, -2)) == lax.expand_dims(places, range(keys.ndim - 4))


def _check_window(inputs: Any, window: int) -> int:
    """Returns the side of a window; raises unless it fits into the inputs."""
    window = check_count("window", window)
    if jnp.ndim(inputs) < 3:
        raise ValueError(
            f"inputs must be [..., height, width, channels], got shape {jnp.shape(inputs)}"
        )
    smaller = min(inputs.shape[-3:-1])
    if window > smaller:
        raise ValueError(
            f"window must not be larger than the image's smaller side {smaller}, got {window}"
        )
    return window
