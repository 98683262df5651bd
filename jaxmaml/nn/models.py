"""The networks of the MAML paper (Finn et al. 2017, arXiv 1703.03400), as Flax NNX modules.

A network is called as `module(inputs, weights=None)`, which is `module.head(module.features(...))`.
By default, Conv4 normalizes with the statistics of the current batch, in training and in testing,
as the code of the paper does: the output for a query example depends on the other query examples,
and there are no running averages to carry. `jaxmaml.nn.norm` describes the other policies.
"""

import functools
import math
from collections.abc import Sequence
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
from jaxmaml.nn.norm import cancels_bias, make_norm
from jaxmaml.nn.pooling import normalize_and_pool
from jaxmaml.padding import blank_padding
from jaxmaml.types import Array


class Conv4(HeadedNetwork):
    """Four blocks of 3x3 convolution, normalization and ReLU, then a linear head.

    With `head_init=nnx.initializers.normal(1.0)`, `norm_scale=False` and a mask under which the
    inner loop adapts everything except the offsets, this is the network of the MAML paper.

    Paths of the parameters, for i in 0..3: `conv/i/kernel`, `conv/i/bias` (with conv_bias),
    `norm/i/offset`, `norm/i/scale` (with norm_scale), `head/kernel`, `head/bias`.

    Args:
        way: the number of outputs.
        image_shape: `(height, width, channels)`.
        num_filters: the number of filters of each convolution.
        pooled: False strides by 2 and averages over space (the paper's Omniglot network); True
            strides by 1, max-pools 2x2 and flattens (its miniImageNet network).
        head_init: the initializer of the head's kernel. Defaults to N(0, 0.01²).
        norm: a policy of `jaxmaml.nn.norm`: "transductive", "inductive", "running", "per_step",
            "layer", "group" or "none".
        norm_scale: whether the normalization learns a scale beside its offset.
        num_steps: the number of inner steps, required by norm="per_step" and refused by others.
        per_step_weights: whether norm="per_step" learns an offset and a scale per step, too.
        conv_bias: whether convolutions have a bias. By default they have one unless the
            normalization cancels it, as batch statistics do; there a bias only reproduces the
            paper's parameter count.
        param_dtype: the dtype of the parameters.
        rngs: the source of the initial parameters.

    Raises:
        TypeError: a count is not an integer.
        ValueError: way, num_filters or image_shape is not positive, the image is too small to be
            pooled four times, or `make_norm` refuses norm or num_steps.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxmaml import nn
        >>> model = nn.Conv4(5, rngs=nnx.Rngs(0))
        >>> images = jnp.ones((10, 28, 28, 1))
        >>> model(images).shape, model.features(images).shape
        ((10, 5), (10, 64))
    """

    def __init__(
        self,
        way: int,
        *,
        image_shape: Sequence[int] = (28, 28, 1),
        num_filters: int = 64,
        pooled: bool = False,
        head_init: Initializer = SMALL,
        norm: str = "transductive",
        norm_scale: bool = True,
        num_steps: int | None = None,
        per_step_weights: bool = True,
        conv_bias: bool | None = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_count("way", way)
        check_count("num_filters", num_filters)
        self.image_shape = check_image_shape(image_shape, smallest=16 if pooled else 1)
        self.pooled = pooled
        channels = [self.image_shape[-1], *[num_filters] * 3]
        stride = 1 if pooled else 2
        use_bias = not cancels_bias(norm, num_filters) if conv_bias is None else conv_bias
        options: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.conv = nnx.List(
            Conv(num_inputs, num_filters, stride=stride, use_bias=use_bias, **options)
            for num_inputs in channels
        )
        new_norm = functools.partial(
            make_norm, norm, scale=norm_scale, num_steps=num_steps,
            per_step_weights=per_step_weights, param_dtype=param_dtype,
        )  # fmt: skip
        self.norm = nnx.List(new_norm(num_filters) for _ in channels)
        height, width, _ = self.image_shape
        num_features = (height // 16) * (width // 16) * num_filters if pooled else num_filters
        self.head = nnx.Linear(num_features, way, kernel_init=head_init, **options)

    def features(self, inputs: Array, weights: Array | None = None) -> Array:
        """Returns the inputs of the head for a batch of images, `[num_examples, num_features]`.

        Arguments and errors are those of a call. Inputs are
        `[num_examples, height, width, channels]`.
        """
        check_images(inputs, self.image_shape)
        features = inputs if weights is None else blank_padding(inputs, weights)
        for convolve, normalize in zip(self.conv, self.norm, strict=True):
            features = convolve(features)
            if self.pooled:
                features = normalize_and_pool([(features, normalize)], weights)
            else:
                features = jax.nn.relu(normalize(features, weights))
        if self.pooled:
            return features.reshape(features.shape[0], -1)
        return features.mean(axis=(1, 2))


class MLP(HeadedNetwork):
    """A multi-layer perceptron with ReLU.

    `MLP(1, 1)` is the MAML paper's sinusoid regressor; `MLP(784, way, hidden=(256, 128, 64, 64),
    norm="transductive", norm_scale=False)` is its fully connected Omniglot network.

    Paths of the parameters, for each hidden layer i: `dense/i/kernel`, `dense/i/bias` (with
    hidden_bias), `norm/i/offset` (with a norm), `norm/i/scale` (with norm_scale); then
    `head/kernel`, `head/bias`.

    Args:
        num_inputs: the size of an example, once flattened.
        num_outputs: the number of outputs per example.
        hidden: the sizes of the hidden layers; `()` gives a linear model.
        norm: the normalization between each hidden layer and its ReLU: a policy of
            `jaxmaml.nn.norm`, as in `Conv4`, or None, which is the policy "none".
        norm_scale: whether the normalization learns a scale beside its offset.
        num_steps: the number of inner steps, required by norm="per_step" and refused by others.
        per_step_weights: whether norm="per_step" learns an offset and a scale per step, too.
        hidden_init: the initializer of the hidden layers' kernels. Defaults to LeCun normal. The
            paper's code uses `nnx.initializers.truncated_normal(0.01)`, for the head, too.
        head_init: the initializer of the head's kernel. Defaults to LeCun normal.
        hidden_bias: whether hidden layers have a bias. By default they have one unless the
            normalization cancels it, as batch statistics do.
        param_dtype: the dtype of the parameters.
        rngs: the source of the initial parameters.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is not positive, or `make_norm` refuses norm or num_steps.

    Example:
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
        norm: str | None = None,
        norm_scale: bool = True,
        num_steps: int | None = None,
        per_step_weights: bool = True,
        hidden_init: Initializer | None = None,
        head_init: Initializer | None = None,
        hidden_bias: bool | None = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_count("num_inputs", num_inputs)
        check_count("num_outputs", num_outputs)
        for size in hidden:
            check_count("each size in hidden", size)
        default_init = nnx.initializers.lecun_normal()
        policy = "none" if norm is None else norm
        options: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        sizes = (num_inputs, *hidden)
        self.num_inputs = num_inputs
        self.dense = nnx.List(
            nnx.Linear(
                fan_in,
                fan_out,
                use_bias=not cancels_bias(policy, fan_out) if hidden_bias is None else hidden_bias,
                kernel_init=hidden_init or default_init,
                **options,
            )
            for fan_in, fan_out in zip(sizes[:-1], hidden, strict=True)
        )
        new_norm = functools.partial(
            make_norm, policy, scale=norm_scale, num_steps=num_steps,
            per_step_weights=per_step_weights, param_dtype=param_dtype,
        )  # fmt: skip
        self.norm = nnx.List(new_norm(size) for size in hidden)
        self.head = nnx.Linear(
            sizes[-1], num_outputs, kernel_init=head_init or default_init, **options
        )

    def features(self, inputs: Array, weights: Array | None = None) -> Array:
        """Returns the inputs of the head for a batch, `[num_examples, num_features]`.

        These are the last hidden layer or, without hidden layers, the inputs. Arguments and errors
        are those of a call. Inputs are `[num_examples, ...]` and are flattened.
        """
        shape = jnp.shape(inputs)
        if not shape or math.prod(shape[1:]) != self.num_inputs:
            raise ValueError(
                f"inputs must be [num_examples, ...] with {self.num_inputs} numbers per example, "
                f"got shape {shape}"
            )
        features = inputs if weights is None else blank_padding(inputs, weights)
        features = features.reshape(shape[0], self.num_inputs)
        for layer, normalize in zip(self.dense, self.norm, strict=True):
            features = jax.nn.relu(normalize(layer(features), weights))
        return features
