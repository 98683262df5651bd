"""ResNet-12, the residual network of few-shot image classification, as a Flax NNX module."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmaml.checks import check_count
from jaxmaml.nn.layers import (
    SMALL,
    Conv,
    HeadedNetwork,
    Initializer,
    check_image_shape,
    check_images,
)
from jaxmaml.nn.norm import Norm, cancels_bias, make_norm
from jaxmaml.nn.pooling import normalize_and_pool
from jaxmaml.padding import blank_padding
from jaxmaml.types import Array


class ResidualBlock(nnx.Module):
    """Three 3x3 convolutions with a 1x1 convolution as shortcut, then 2x2 max-pooling.

    The activations are leaky ReLUs of slope 0.1.

    Args:
        channels: the number of input channels.
        num_filters: the number of filters of each convolution.
        new_norm: `(num_channels) -> norm`, a normalization as `make_norm` returns it.
        use_bias: whether convolutions have a bias.
        param_dtype: the dtype of the parameters.
        rngs: the source of the initial parameters.
    """

    def __init__(
        self,
        channels: int,
        num_filters: int,
        *,
        new_norm: Callable[[int], Norm],
        use_bias: bool,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"use_bias": use_bias, "param_dtype": param_dtype, "rngs": rngs}
        self.conv = nnx.List(
            Conv(num_inputs, num_filters, **options)
            for num_inputs in (channels, num_filters, num_filters)
        )
        self.norm = nnx.List(new_norm(num_filters) for _ in self.conv)
        self.shortcut = Conv(channels, num_filters, size=1, **options)
        self.shortcut_norm = new_norm(num_filters)

    def __call__(self, inputs: Array, weights: Array | None = None) -> Array:
        """Returns the outputs of the block.

        Args:
            inputs: `[num_examples, height, width, channels]`.
            weights: `[num_examples]`, how much each example counts in the normalization.

        Returns:
            `[num_examples, height // 2, width // 2, num_filters]`.
        """
        features = inputs
        for convolve, normalize in zip(self.conv[:-1], self.norm[:-1], strict=True):
            features = _leaky_relu(normalize(convolve(features), weights))
        branches = [
            (self.conv[-1](features), self.norm[-1]),
            (self.shortcut(inputs), self.shortcut_norm),
        ]
        return normalize_and_pool(branches, weights, activation=_leaky_relu)


class ResNet12(HeadedNetwork):
    """Four residual blocks of three 3x3 convolutions, an average over space and a linear head.

    This is the network of Lee et al. 2019 (MetaOptNet, arXiv 1904.03758, section 4.1) without
    DropBlock or other dropout, with 64-128-256-512 filters in place of 64-160-320-640.

    Paths of the parameters, for each block i and j in 0..2: `block/i/conv/j/kernel`,
    `block/i/norm/j/offset`, `block/i/shortcut/kernel`, `block/i/shortcut_norm/offset`; with
    norm_scale a `scale` beside each `offset`; a `bias` beside each convolution's `kernel` unless
    the normalization cancels it; then `head/kernel`, `head/bias`.

    Args:
        way: the number of outputs.
        image_shape: `(height, width, channels)`; each block halves the sides, so they must be at
            least 16 for four blocks.
        num_filters: the number of filters of each block's convolutions; its length is the number of
            blocks.
        head_init: the initializer of the head's kernel. Defaults to N(0, 0.01²).
        norm: a policy of `jaxmaml.nn.norm`, as in `Conv4`.
        norm_scale: whether the normalization learns a scale beside its offset.
        num_steps: the number of inner steps, required by norm="per_step" and refused by others.
        per_step_weights: whether norm="per_step" learns an offset and a scale per step, too.
        param_dtype: the dtype of the parameters.
        rngs: the source of the initial parameters.

    Raises:
        TypeError: a count is not an integer.
        ValueError: way, num_filters or image_shape is not positive, num_filters is empty, the image
            is too small to be pooled once per block, or `make_norm` refuses norm or num_steps.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxmaml import nn
        >>> model = nn.ResNet12(5, image_shape=(16, 16, 3), num_filters=(2, 4), rngs=nnx.Rngs(0))
        >>> images = jnp.ones((10, 16, 16, 3))
        >>> model(images).shape, model.features(images).shape
        ((10, 5), (10, 4))
    """

    def __init__(
        self,
        way: int,
        *,
        image_shape: Sequence[int] = (84, 84, 3),
        num_filters: Sequence[int] = (64, 128, 256, 512),
        head_init: Initializer = SMALL,
        norm: str = "transductive",
        norm_scale: bool = True,
        num_steps: int | None = None,
        per_step_weights: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_count("way", way)
        check_count("the length of num_filters", len(num_filters))
        for number in num_filters:
            check_count("each number in num_filters", number)
        self.image_shape = check_image_shape(image_shape, smallest=2 ** len(num_filters))
        new_norm = functools.partial(
            make_norm, norm, scale=norm_scale, num_steps=num_steps,
            per_step_weights=per_step_weights, param_dtype=param_dtype,
        )  # fmt: skip
        options: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        channels = (self.image_shape[-1], *num_filters)
        self.block = nnx.List(
            ResidualBlock(
                size_in,
                size_out,
                new_norm=new_norm,
                use_bias=not cancels_bias(norm, size_out),
                **options,
            )
            for size_in, size_out in zip(channels[:-1], num_filters, strict=True)
        )
        self.head = nnx.Linear(channels[-1], way, kernel_init=head_init, **options)

    def features(self, inputs: Array, weights: Array | None = None) -> Array:
        """Returns the inputs of the head for a batch of images, `[num_examples, num_filters[-1]]`.

        Arguments and errors are those of a call. Inputs are
        `[num_examples, height, width, channels]`.
        """
        check_images(inputs, self.image_shape)
        features = inputs if weights is None else blank_padding(inputs, weights)
        for block in self.block:
            features = block(features, weights)
        return features.mean(axis=(1, 2))


def _leaky_relu(inputs: Array) -> Array:
    return jax.nn.leaky_relu(inputs, 0.1)
