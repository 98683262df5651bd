"""Building blocks of the networks: their base class, a convolution layer, and checks of inputs."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxmaml.nn.convolution import conv
from jaxmaml.types import Array

Initializer = Callable[..., Array]

SMALL = nnx.initializers.normal(0.01)
"""The default initializer of the head of an image classifier."""


class HeadedNetwork(nnx.Module):
    """A network of features and a linear head.

    A subclass defines `features` and sets `head` when it is built.
    """

    head: nnx.Linear

    def __call__(self, inputs: Array, weights: Array | None = None) -> Array:
        """Returns the outputs for a batch, `head(features(inputs, weights))`.

        Args:
            inputs: `[num_examples, ...]`; the class says which shapes an example may have.
            weights: `[num_examples]`, not negative: how much each example counts in the
                normalization. An example of weight zero has no influence on the others, whatever it
                holds.

        Returns:
            `[num_examples, num_outputs]`.

        Raises:
            ValueError: inputs or weights have another shape.
        """
        return self.head(self.features(inputs, weights))

    def features(self, inputs: Array, weights: Array | None = None) -> Array:
        """Returns the inputs of the head, `[num_examples, num_features]`; see `__call__`."""
        raise NotImplementedError


class Conv(nnx.Module):
    """A square convolution by `nn.conv`.

    Parameters: `kernel` `[size, size, channels, num_filters]` and, with use_bias, `bias`
    `[num_filters]`.

    Args:
        channels: the number of input channels.
        num_filters: the number of output channels.
        size: the side of the kernel.
        stride: the step between neighboring outputs.
        use_bias: whether there is a bias.
        param_dtype: the dtype of the parameters.
        rngs: the source of the initial parameters.
    """

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
        """Returns the convolution of `[..., height, width, channels]`."""
        outputs = conv(inputs, self.kernel[...], stride=self.stride)
        return outputs + as_row(self.bias[...], outputs.ndim) if self.use_bias else outputs


def as_row(vector: Array, ndim: int) -> Array:
    """Returns a vector as `[1, ..., 1, num_channels]`, which broadcasts without rank promotion."""
    return vector.reshape((1,) * (ndim - 1) + (-1,))


def check_image_shape(image_shape: Sequence[int], smallest: int) -> tuple[int, int, int]:
    """Returns the shape of an image as a tuple.

    Raises:
        ValueError: it is not (height, width, channels), or a side is shorter than `smallest`.
    """
    if len(image_shape) != 3 or min(image_shape[:2]) < smallest or image_shape[2] < 1:
        raise ValueError(
            f"image_shape must be (height, width, channels), with sides of at least {smallest} "
            f"for this network, got {tuple(image_shape)}"
        )
    height, width, channels = image_shape
    return height, width, channels


def check_images(inputs: Array, image_shape: tuple[int, int, int]) -> None:
    """Raises ValueError unless `inputs` are `[num_examples, *image_shape]`."""
    if jnp.ndim(inputs) != 4 or inputs.shape[1:] != image_shape:
        raise ValueError(
            f"inputs must be [num_examples, {', '.join(map(str, image_shape))}], "
            f"got shape {jnp.shape(inputs)}"
        )
