"""Convolution and max-pooling that stay fast when each task has its own weights."""

import functools

import jax.numpy as jnp
from jax import lax

from jaxmaml.checks import check_choice, check_count
from jaxmaml.types import Array


def conv(inputs: Array, kernel: Array, *, stride: int = 1, padding: str = "SAME") -> Array:
    """Returns the two-dimensional convolution, computed as patches times a matrix.

    The result equals that of `lax.conv_general_dilated` up to rounding, derivatives included. Under
    `vmap` over kernels it becomes a batched matrix product, whereas `lax.conv_general_dilated`
    becomes a grouped convolution with a slow backward pass.

    Args:
        inputs: `[..., height, width, channels]`, usually `[num_examples, height, width, channels]`.
        kernel: `[kernel_height, kernel_width, channels, num_filters]`.
        stride: the step between neighboring outputs, the same in both directions.
        padding: "SAME" (output size `ceil(size / stride)`, TensorFlow's convention) or "VALID".

    Returns:
        `[..., out_height, out_width, num_filters]`, in the promoted dtype of inputs and kernel.

    Raises:
        TypeError: stride is not an integer.
        ValueError: the shapes of inputs and kernel do not fit, stride is less than 1, or padding is
            neither "SAME" nor "VALID".

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmaml import nn
        >>> nn.conv(jnp.ones((5, 28, 28, 1)), jnp.ones((3, 3, 1, 64)), stride=2).shape
        (5, 14, 14, 64)
    """
    _check_conv(inputs, kernel, stride, padding)
    kernel_height, kernel_width, _, num_filters = kernel.shape
    patches = _patches(inputs, (kernel_height, kernel_width), stride, padding)
    outputs = _product(patches.reshape(-1, patches.shape[-1]), kernel.reshape(-1, num_filters))
    return outputs.reshape(*patches.shape[:-1], num_filters)


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
    window = check_count("window", window)
    if jnp.ndim(inputs) < 3:
        raise ValueError(
            f"inputs must be [..., height, width, channels], got shape {jnp.shape(inputs)}"
        )
    height, width = inputs.shape[-3:-1]
    if window > min(height, width):
        raise ValueError(
            f"window must not be larger than the image's smaller side {min(height, width)}, "
            f"got {window}"
        )
    rows, columns = height // window, width // window
    # The second derivative of strided slices is far faster than that of a window reduction.
    entries = [
        inputs[..., i : rows * window : window, j : columns * window : window, :]
        for i in range(window)
        for j in range(window)
    ]
    return functools.reduce(_larger, entries)


def _larger(first: Array, second: Array) -> Array:
    # Not jnp.maximum or max: their derivatives look for the entries EQUAL to the result. A compiler
    # that computes the result again, with another rounding, finds none: then max gives 0/0 and
    # maximum drops the gradient (seen on XLA CPU). A comparison always selects one entry.
    return jnp.where((first >= second) | jnp.isnan(first), first, second)


def _product(patches: Array, matrix: Array) -> Array:
    """Returns `patches @ matrix`, two-dimensional, in the form with the fastest gradient.

    The gradient with respect to the matrix is `patches.T @ cotangent`, which XLA CPU computes at
    half the speed of `cotangent.T @ patches` (benchmarks/convolution.py). A product with the
    transposed matrix has the second as its gradient; the barrier keeps XLA from undoing the
    transposition.
    """
    if matrix.shape[0] < matrix.shape[1]:
        return patches @ matrix
    transposed = lax.optimization_barrier(matrix.T)
    return lax.dot_general(patches, transposed, (((1,), (1,)), ((), ())))


def _patches(inputs: Array, size: tuple[int, int], stride: int, padding: str) -> Array:
    """Returns patches `[..., out_height, out_width, kernel_height * kernel_width * channels]`."""
    # Strided slices, because lax.conv_general_dilated_patches is itself a slow convolution, with an
    # identity kernel.
    strides = (stride, stride)
    pads = lax.padtype_to_pads(inputs.shape[-3:-1], size, strides, padding)
    padded = jnp.pad(inputs, [(0, 0)] * (inputs.ndim - 3) + [*pads, (0, 0)])
    height, width = padded.shape[-3:-1]
    slices = [
        padded[..., i : height - size[0] + i + 1 : stride, j : width - size[1] + j + 1 : stride, :]
        for i in range(size[0])
        for j in range(size[1])
    ]
    return jnp.concatenate(slices, axis=-1)


def _check_conv(inputs: Array, kernel: Array, stride: int, padding: str) -> None:
    check_count("stride", stride)
    check_choice("padding", padding, ("SAME", "VALID"))
    if jnp.ndim(kernel) != 4:
        raise ValueError(
            "kernel must be [kernel_height, kernel_width, channels, num_filters], "
            f"got shape {jnp.shape(kernel)}"
        )
    if jnp.ndim(inputs) < 3 or inputs.shape[-1] != kernel.shape[2]:
        raise ValueError(
            f"inputs must be [..., height, width, {kernel.shape[2]}] for a kernel of shape "
            f"{kernel.shape}, got shape {jnp.shape(inputs)}"
        )
    if padding == "VALID" and (
        inputs.shape[-3] < kernel.shape[0] or inputs.shape[-2] < kernel.shape[1]
    ):
        raise ValueError(
            f"inputs must be at least as large as the kernel with padding='VALID', got "
            f"{inputs.shape[-3:-1]} and {kernel.shape[:2]}"
        )
