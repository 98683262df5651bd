"""What the networks are built of: a convolution with its weights, and checks of what comes in."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxmaml.nn.conv import conv
from jaxmaml.types import Array

Initializer = Callable[..., Array]

SMALL = nnx.initializers.normal(0.01)
"""The initialiser of an image classifier's head unless told."""


class Conv(nnx.Module):
    """A square convolution with `nn.conv`; `kernel` `[size, size, channels, num_filters]`."""

    def __init__(
        self,
        channels: int,
        num_filters: int,
        *,
        size: int = 3,
        stride: int = 1,
        use_bias: bool,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.xavier_uniform()
        self.kernel = nnx.Param(
            init(rngs.params(), (size, size, channels, num_filters), param_dtype)
        )
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(num_filters, param_dtype))
        self.use_bias = use_bias
        self.stride = stride

    def __call__(self, inputs: Array) -> Array:
        outputs = conv(inputs, self.kernel[...], stride=self.stride)
        return outputs + as_row(self.bias[...], outputs.ndim) if self.use_bias else outputs


def as_row(vector: Array, ndim: int) -> Array:
    """`[1, ..., 1, num_channels]`: broadcasting without promoting ranks."""
    return vector.reshape((1,) * (ndim - 1) + (-1,))


def check_positive(**sizes: int) -> None:
    """Raises ValueError naming the first size that is smaller than 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def check_image_shape(image_shape: Sequence[int], smallest: int) -> tuple[int, int, int]:
    """The shape as a tuple; ValueError if it is none, or a side is shorter than `smallest`."""
    if len(image_shape) != 3 or min(image_shape[:2]) < smallest or image_shape[2] < 1:
        raise ValueError(
            f"image_shape must be (height, width, channels), with sides of at least {smallest} "
            f"for this network, got {tuple(image_shape)}"
        )
    height, width, channels = image_shape
    return height, width, channels


def check_images(inputs: Array, image_shape: tuple[int, int, int]) -> None:
    """Raises ValueError unless `inputs` are images of that shape."""
    if jnp.ndim(inputs) != 4 or inputs.shape[1:] != image_shape:
        raise ValueError(
            f"inputs must be [num_examples, {', '.join(map(str, image_shape))}], "
            f"got shape {jnp.shape(inputs)}"
        )
