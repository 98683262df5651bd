"""Max-pooling whose derivatives are fast, and the order in which to normalize and to pool.

On a CPU the pooling is the bottleneck of a pooled network. A maximum over strided slices has a
derivative of interior pads, which XLA runs as scalar code. Here each window has a mask with the place
of its first maximum, and the mask selects from a view `[..., rows, window, columns, window, channels]`:
the derivatives of every order are selections, too.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmaml.checks import check_count
from jaxmaml.nn.normalizer import Normalizer
from jaxmaml.types import Array


class Norm(Protocol):
    """A normalization that `make_norm` returns."""

    def normalizer(self, inputs: Array, weights: Array | None = None) -> Normalizer:
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
    return pool_by(inputs, _square(inputs, window))(inputs)


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
        >>> (outputs > 0)[0, ..., 0].tolist()
        [[False, False], [True, True]]
    """
    images = [jnp.asarray(inputs) for inputs, _ in branches]
    normalizers = [
        norm.normalizer(inputs, weights) for inputs, (_, norm) in zip(images, branches, strict=True)
    ]

    # A shift moves all entries of a window alike. It is left out of what is compared, in full size.
    scaled = [f.scaled(inputs) for f, inputs in zip(normalizers, images, strict=True)]
    pool = pool_by(functools.reduce(operator.add, scaled), _square(images[0], window))
    normalized = [f(pool(inputs)) for f, inputs in zip(normalizers, images, strict=True)]
    return activation(functools.reduce(operator.add, normalized))


def pool_by(keys: Array, windows: tuple[int, ...]) -> Callable[[Array], Array]:
    """Returns the pooling that takes from each window the entry whose key is the largest.

    Args:
        keys: `[..., *space, channels]`; no derivative passes through them.
        windows: the sides of the windows, and the strides, along the axes of space.

    Returns:
        A function from `[..., *space, channels]` to the same with every axis of space divided by its
        window and rounded down.

    Example:
        >>> keys, values = jnp.array([[1.0], [3.0], [2.0]]), jnp.array([[5.0], [6.0], [7.0]])
        >>> pool_by(keys, (2,))(values).tolist()
        [[6.0]]
    """
    if set(windows) <= {1}:
        return lambda values: values
    is_first_largest = _is_first_largest(_view(lax.stop_gradient(keys), windows), windows)

    def pool(values: Array) -> Array:
        # A selection, because a product with a mask of zeros would make NaN of infinite entries.
        zero = jnp.zeros((), values.dtype)
        selected = jnp.where(is_first_largest, _view(values, windows), zero)
        return selected.sum(axis=_window_axes(windows), dtype=values.dtype)

    return pool


def _view(values: Array, windows: tuple[int, ...]) -> Array:
    """Returns whole windows, in two dimensions `[..., rows, window, columns, window, channels]`."""
    first = values.ndim - 1 - len(windows)
    numbers = [side // window for side, window in zip(values.shape[first:-1], windows, strict=True)]
    ends = [number * window for number, window in zip(numbers, windows, strict=True)]
    whole = values[(..., *map(slice, ends), slice(None))]
    split = [size for pair in zip(numbers, windows, strict=True) for size in pair]
    return whole.reshape(*values.shape[:first], *split, values.shape[-1])


def _window_axes(windows: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the axes of a view that lie within a window."""
    return tuple(range(-2 * len(windows), -1, 2))


def _is_first_largest(view: Array, windows: tuple[int, ...]) -> Array:
    """Returns where each window has its first maximum; a NaN is larger than any number."""
    # The place of the maximum rather than a comparison with it: a compiler that computes the keys
    # again, with another rounding, may find no entry equal to it (seen on XLA CPU). A reduction,
    # because XLA computes comparisons of entries once per use and entry of the window: in the exact
    # gradient of Conv4 that took a third of the time.
    axes = _window_axes(windows)
    entries = jnp.moveaxis(view, axes, range(-1 - len(axes), -1))
    entries = entries.reshape(*entries.shape[: -1 - len(axes)], -1, view.shape[-1])
    first = lax.argmax(entries, entries.ndim - 2, np.int32)

    # An array of NumPy, because XLA knows its numbers inside loops, too.
    sides = [size for window in windows for size in (1, window)]
    numbers = np.arange(math.prod(windows), dtype=np.int32)
    numbers = numbers.reshape((1,) * (view.ndim - 1 - len(sides)) + (*sides, 1))
    return jnp.expand_dims(first, axes) == numbers


def _square(inputs: Any, window: int) -> tuple[int, int]:
    """Returns the sides of a square window; raises unless it fits into the inputs."""
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
    return window, window
