"""Convolution that stays fast when each task has its own weights."""

from typing import Any

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
    outputs = product(patches.reshape(-1, patches.shape[-1]), kernel.reshape(-1, num_filters))
    return outputs.reshape(*patches.shape[:-1], num_filters)


def product(patches: Array, matrix: Array, **options: Any) -> Array:
    """Returns `patches @ matrix`, two-dimensional, in the form with the fastest gradient.

    Options are those of `lax.dot_general`. The gradient with respect to the matrix is
    `patches.T @ cotangent`, which XLA CPU computes at half the speed of `cotangent.T @ patches`
    (benchmarks/convolution.py). A product with the transposed matrix has the second as its gradient;
    the barrier keeps XLA from undoing the transposition.
    """
    if matrix.shape[0] < matrix.shape[1]:
        return jnp.matmul(patches, matrix, **options)
    transposed = lax.optimization_barrier(matrix.T)
    return lax.dot_general(patches, transposed, (((1,), (1,)), ((), ())), **options)


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
