"""ResNet-12, the residual network of few-shot image classification, as a Flax NNX module."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmaml.nn.conv import max_pool
from jaxmaml.nn.layers import (
    SMALL,
    Conv,
    Initializer,
    check_image_shape,
    check_images,
    check_positive,
)
from jaxmaml.nn.norm import Norm, cancels_bias, make_norm
from jaxmaml.nn.padding import blank_padding
from jaxmaml.types import Array


class ResidualBlock(nnx.Module):
    """Three 3x3 convolutions beside a 1x1 one, then a max-pool of 2x2; leaky ReLUs of slope 0.1.

    Args:
        channels: of the inputs.
        num_filters: of each convolution.
        new_norm: the normalisation of so many channels, as `make_norm` returns it.
        use_bias: whether convolutions have a bias.
        param_dtype: type of the parameters.
        rngs: source of the initial parameters.
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
        """`[num_examples, height, width, channels]` to `[.., height // 2, width // 2, filters]`."""
        outputs = self.shortcut_norm(self.shortcut(inputs), weights)
        features = inputs
        for i, (convolve, normalise) in enumerate(zip(self.conv, self.norm, strict=True)):
            features = _leaky_relu(features) if i else features
            features = normalise(convolve(features), weights)
        return max_pool(_leaky_relu(features + outputs))


class ResNet12(nnx.Module):
    """Four residual blocks of three 3x3 convolutions, an average over space and a linear head.

    The network of Lee et al. 2019 (MetaOptNet, arXiv 1904.03758, section 4.1) without its DropBlock,
    with 64-128-256-512 filters; theirs are 64-160-320-640. It has no drop-out. Parameters:
    `block/i/conv/j/kernel`, `block/i/norm/j/offset` (`scale`), `block/i/shortcut/kernel`,
    `block/i/shortcut_norm/offset` (`scale`), `head/kernel`, `head/bias`; convolutions have a bias
    where the normalisation would not cancel it.

    Args:
        way: number of outputs.
        image_shape: `(height, width, channels)`, sides of at least 16.
        num_filters: of the convolutions of each block; as many blocks as numbers.
        head_init: initialiser of the head's kernel; N(0, 0.01²) unless told.
        norm, norm_scale, num_steps, per_step_weights: see `Conv4`.
        param_dtype: type of the parameters.
        rngs: source of the initial parameters.

    Raises:
        ValueError: if way, num_filters or image_shape is not positive, the image is too small to be
            pooled once a block, or norm and num_steps are none that `make_norm` takes.

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
        check_positive(way=way, num_filters=min(num_filters, default=0))
        self.image_shape = check_image_shape(image_shape, smallest=2 ** len(num_filters))
        new_norm = functools.partial(
            make_norm, norm, scale=norm_scale, num_steps=num_steps,
            per_step_weights=per_step_weights, param_dtype=param_dtype,
        )  # fmt: skip
        options: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        use_bias = not cancels_bias(norm)
        channels = (self.image_shape[-1], *num_filters)
        self.block = nnx.List(
            ResidualBlock(size_in, size_out, new_norm=new_norm, use_bias=use_bias, **options)
            for size_in, size_out in zip(channels[:-1], num_filters, strict=True)
        )
        self.head = nnx.Linear(channels[-1], way, kernel_init=head_init, **options)

    def __call__(self, inputs: Array, weights: Array | None = None) -> Array:
        """Logits of a batch of images.

        Args:
            inputs: `[num_examples, height, width, channels]`.
            weights: `[num_examples]`, not negative: how much each example counts in the
                normalisation. One of zero weight has no influence on the others, whatever it holds.

        Returns:
            `[num_examples, way]`.

        Raises:
            ValueError: if inputs or weights have another shape.
        """
        return self.head(self.features(inputs, weights))

    def features(self, inputs: Array, weights: Array | None = None) -> Array:
        """What the head sees of a batch of images, `[num_examples, num_filters[-1]]`.

        Inputs, weights and errors are those of a call.
        """
        check_images(inputs, self.image_shape)
        features = inputs if weights is None else blank_padding(inputs, weights)
        for block in self.block:
            features = block(features, weights)
        return features.mean(axis=(1, 2))


def _leaky_relu(inputs: Array) -> Array:
    return jax.nn.leaky_relu(inputs, 0.1)
