"""The networks of the MAML paper (Finn et al. 2017, arXiv 1703.03400), as Flax NNX modules.

Both are called `module(inputs, weights=None)`. Normalisation uses the statistics of the batch at
hand, in training and in testing, as the paper's code does: a query example's output depends on the
other query examples, and there are no running averages to carry.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmaml.nn.conv import conv, max_pool
from jaxmaml.nn.padding import blank_padding
from jaxmaml.types import Array

Initializer = Callable[..., Array]

NORM_EPS = 1e-3
"""Added to the variance; the default of the paper's code (tf.contrib.layers.batch_norm)."""

_SMALL = nnx.initializers.normal(0.01)


class BatchStatisticsNorm(nnx.Module):
    """Normalises each channel by its mean and variance over the examples (and space) at hand.

    Args:
        num_channels: size of the last axis.
        scale: whether to learn a scale beside the offset.
        param_dtype: type of the parameters.
    """

    def __init__(self, num_channels: int, *, scale: bool = True, param_dtype: Any = jnp.float32):
        self.offset = nnx.Param(jnp.zeros(num_channels, param_dtype))
        if scale:
            self.scale = nnx.Param(jnp.ones(num_channels, param_dtype))
        self.has_scale = scale

    def __call__(self, inputs: Array, weights: Array | None = None) -> Array:
        """Normalises `[num_examples, ..., num_channels]`, examples counting by their weights."""
        offset = self.offset[...]
        dtype = jnp.result_type(inputs, offset)
        values = inputs.astype(jnp.promote_types(dtype, jnp.float32))
        # The variance of the deviations: E[x²] - E[x]² would cancel where the mean is large.
        mean = _batch_mean(values, weights)
        factor = jax.lax.rsqrt(_batch_mean((values - mean) ** 2, weights) + NORM_EPS)
        if self.has_scale:
            factor = factor * _as_row(self.scale[...], values.ndim)
        # One line of x, and not a product of deviations, which would be kept beside x: with 75 query
        # images this takes a fifth off an outer step of Conv4 on a CPU, where memory is what costs.
        return (values * factor + (_as_row(offset, values.ndim) - mean * factor)).astype(dtype)


class Conv(nnx.Module):
    """A 3x3 convolution with `nn.conv`; `kernel` `[3, 3, channels, num_filters]`."""

    def __init__(
        self,
        channels: int,
        num_filters: int,
        *,
        stride: int,
        use_bias: bool,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.xavier_uniform()
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, channels, num_filters), param_dtype))
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(num_filters, param_dtype))
        self.use_bias = use_bias
        self.stride = stride

    def __call__(self, inputs: Array) -> Array:
        outputs = conv(inputs, self.kernel[...], stride=self.stride)
        return outputs + _as_row(self.bias[...], outputs.ndim) if self.use_bias else outputs


class Conv4(nnx.Module):
    """Four blocks of 3x3 convolution, batch-statistics normalisation and ReLU, then a linear head.

    With `head_init=nnx.initializers.normal(1.0)`, `norm_scale=False` and a mask under which the
    inner loop adapts all but the offsets, this is the network of the MAML paper. Parameters:
    `conv/i/kernel` (`conv/i/bias`), `norm/i/offset` (`norm/i/scale`), `head/kernel`, `head/bias`.

    Args:
        way: number of outputs.
        image_shape: `(height, width, channels)`.
        num_filters: of each convolution.
        pooled: False strides by 2 and averages over space (the paper's Omniglot network); True
            strides by 1, max-pools 2x2 and flattens (its miniImageNet network).
        head_init: initialiser of the head's kernel; N(0, 0.01²) unless told.
        norm_scale: whether normalisation learns a scale beside its offset.
        conv_bias: whether convolutions have a bias. Normalisation cancels it exactly, so that it
            only reproduces the paper's parameter count.
        param_dtype: type of the parameters.
        rngs: source of the initial parameters.

    Raises:
        ValueError: if way, num_filters or image_shape is not positive, or the image is too small
            to be pooled four times.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from jaxmaml import nn
    >>> nn.Conv4(5, rngs=nnx.Rngs(0))(jnp.ones((10, 28, 28, 1))).shape
    (10, 5)
    """

    def __init__(
        self,
        way: int,
        *,
        image_shape: Sequence[int] = (28, 28, 1),
        num_filters: int = 64,
        pooled: bool = False,
        head_init: Initializer = _SMALL,
        norm_scale: bool = True,
        conv_bias: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        _check_positive(way=way, num_filters=num_filters)
        self.image_shape = _check_image_shape(image_shape, pooled)
        self.pooled = pooled
        channels = [self.image_shape[-1], *[num_filters] * 3]
        stride = 1 if pooled else 2
        options: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.conv = nnx.List(
            Conv(num_inputs, num_filters, stride=stride, use_bias=conv_bias, **options)
            for num_inputs in channels
        )
        self.norm = nnx.List(
            BatchStatisticsNorm(num_filters, scale=norm_scale, param_dtype=param_dtype)
            for _ in channels
        )
        height, width, _ = self.image_shape
        num_features = (height // 16) * (width // 16) * num_filters if pooled else num_filters
        self.head = nnx.Linear(num_features, way, kernel_init=head_init, **options)

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
        if jnp.ndim(inputs) != 4 or inputs.shape[1:] != self.image_shape:
            raise ValueError(
                f"inputs must be [num_examples, {', '.join(map(str, self.image_shape))}], "
                f"got shape {jnp.shape(inputs)}"
            )
        features = inputs if weights is None else blank_padding(inputs, weights)
        for convolve, normalise in zip(self.conv, self.norm, strict=True):
            features = jax.nn.relu(normalise(convolve(features), weights))
            features = max_pool(features) if self.pooled else features
        if self.pooled:
            return self.head(features.reshape(features.shape[0], -1))
        return self.head(features.mean(axis=(1, 2)))


class MLP(nnx.Module):
    """A multi-layer perceptron with ReLU.

    `MLP(1, 1)` is the MAML paper's sinusoid regressor; `MLP(784, way, hidden=(256, 128, 64, 64),
    norm=True, norm_scale=False)` its fully connected Omniglot network. Parameters: `dense/i/kernel`
    (`dense/i/bias`), with norm `norm/i/offset` (`norm/i/scale`), `head/kernel`, `head/bias`.

    Args:
        num_inputs: numbers per example, once flattened.
        num_outputs: outputs per example.
        hidden: sizes of the hidden layers; `()` gives a linear model.
        norm: whether batch-statistics normalisation stands between each hidden layer and its ReLU.
        norm_scale: whether normalisation learns a scale beside its offset.
        hidden_init: initialiser of the hidden layers' kernels; LeCun normal unless told. The
            paper's code uses `nnx.initializers.truncated_normal(0.01)`, for the head too.
        head_init: initialiser of the head's kernel; LeCun normal unless told.
        hidden_bias: whether hidden layers have a bias; unless told, where there is no
            normalisation, which would cancel it exactly.
        param_dtype: type of the parameters.
        rngs: source of the initial parameters.

    Raises:
        ValueError: if a size is not positive.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from jaxmaml import nn
    >>> nn.MLP(1, 1, rngs=nnx.Rngs(0))(jnp.ones((10, 1))).shape
    (10, 1)
    """

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        *,
        hidden: Sequence[int] = (40, 40),
        norm: bool = False,
        norm_scale: bool = True,
        hidden_init: Initializer | None = None,
        head_init: Initializer | None = None,
        hidden_bias: bool | None = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        _check_positive(
            num_inputs=num_inputs, num_outputs=num_outputs, hidden=min(hidden, default=1)
        )
        default_init = nnx.initializers.lecun_normal()
        use_bias = not norm if hidden_bias is None else hidden_bias
        options: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        sizes = (num_inputs, *hidden)
        self.num_inputs = num_inputs
        self.dense = nnx.List(
            nnx.Linear(
                fan_in,
                fan_out,
                use_bias=use_bias,
                kernel_init=hidden_init or default_init,
                **options,
            )
            for fan_in, fan_out in zip(sizes[:-1], hidden, strict=True)
        )
        self.norm = nnx.List(
            BatchStatisticsNorm(size, scale=norm_scale, param_dtype=param_dtype)
            for size in (hidden if norm else ())
        )
        self.head = nnx.Linear(
            sizes[-1], num_outputs, kernel_init=head_init or default_init, **options
        )

    def __call__(self, inputs: Array, weights: Array | None = None) -> Array:
        """Outputs of a batch.

        Args:
            inputs: `[num_examples, ...]`, flattened to `[num_examples, num_inputs]`.
            weights: `[num_examples]`, not negative: how much each example counts in the
                normalisation. One of zero weight has no influence on the others, whatever it holds.

        Returns:
            `[num_examples, num_outputs]`.

        Raises:
            ValueError: if inputs or weights have another shape.
        """
        shape = jnp.shape(inputs)
        if not shape or math.prod(shape[1:]) != self.num_inputs:
            raise ValueError(
                f"inputs must be [num_examples, ...] with {self.num_inputs} numbers per example, "
                f"got shape {shape}"
            )
        features = inputs if weights is None else blank_padding(inputs, weights)
        features = features.reshape(shape[0], self.num_inputs)
        for i, layer in enumerate(self.dense):
            features = layer(features)
            features = self.norm[i](features, weights) if len(self.norm) else features
            features = jax.nn.relu(features)
        return self.head(features)


def _batch_mean(values: Array, weights: Array | None) -> Array:
    """Mean over all axes but the last, which are kept with size 1."""
    axes = tuple(range(values.ndim - 1))
    if weights is None:
        return values.mean(axis=axes, keepdims=True)
    means = values.mean(axis=axes[1:], keepdims=True)
    column = jnp.asarray(weights, values.dtype).reshape((-1,) + (1,) * (values.ndim - 1))
    return (column * means).sum(axis=0, keepdims=True) / column.sum()


def _as_row(vector: Array, ndim: int) -> Array:
    """`[1, ..., 1, num_channels]`: broadcasting without promoting ranks."""
    return vector.reshape((1,) * (ndim - 1) + (-1,))


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def _check_image_shape(image_shape: Sequence[int], pooled: bool) -> tuple[int, int, int]:
    smallest = 16 if pooled else 1
    if len(image_shape) != 3 or min(image_shape[:2]) < smallest or image_shape[2] < 1:
        raise ValueError(
            f"image_shape must be (height, width, channels), with sides of at least {smallest} "
            f"for pooled={pooled}, got {tuple(image_shape)}"
        )
    height, width, channels = image_shape
    return height, width, channels
