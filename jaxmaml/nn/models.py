"""The networks of the MAML paper (Finn et al. 2017, arXiv 1703.03400), as Flax NNX modules.

Both are called `module(inputs, weights=None)`, which is `module.head(module.features(..))`. Unless
told, Conv4 normalises with the statistics of the batch at hand, in training and in testing, as the
paper's code does: a query example's output depends on the other query examples, and there are no
running averages to carry. `jaxmaml.nn.norm` says what else there is.
"""

import functools
import math
from collections.abc import Sequence
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
from jaxmaml.nn.norm import cancels_bias, make_norm
from jaxmaml.nn.padding import blank_padding
from jaxmaml.types import Array


class Conv4(nnx.Module):
    """Four blocks of 3x3 convolution, normalisation and ReLU, then a linear head.

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
        norm: a policy of `jaxmaml.nn.norm`: "transductive", "inductive", "running", "per_step",
            "layer", "group" or "none".
        norm_scale: whether normalisation learns a scale beside its offset.
        num_steps: the number of inner steps, for norm="per_step" and only for it.
        per_step_weights: whether norm="per_step" learns an offset and a scale for each step too.
        conv_bias: whether convolutions have a bias; unless told, where the normalisation would not
            cancel it exactly, as batch statistics do: there it only reproduces the paper's
            parameter count.
        param_dtype: type of the parameters.
        rngs: source of the initial parameters.

    Raises:
        ValueError: if way, num_filters or image_shape is not positive, the image is too small to be
            pooled four times, or norm and num_steps are none that `make_norm` takes.

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
        check_positive(way=way, num_filters=num_filters)
        self.image_shape = check_image_shape(image_shape, smallest=16 if pooled else 1)
        self.pooled = pooled
        channels = [self.image_shape[-1], *[num_filters] * 3]
        stride = 1 if pooled else 2
        use_bias = not cancels_bias(norm) if conv_bias is None else conv_bias
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
        """What the head sees of a batch of images, `[num_examples, num_features]`.

        Inputs, weights and errors are those of a call.
        """
        check_images(inputs, self.image_shape)
        features = inputs if weights is None else blank_padding(inputs, weights)
        for convolve, normalise in zip(self.conv, self.norm, strict=True):
            features = jax.nn.relu(normalise(convolve(features), weights))
            features = max_pool(features) if self.pooled else features
        if self.pooled:
            return features.reshape(features.shape[0], -1)
        return features.mean(axis=(1, 2))


class MLP(nnx.Module):
    """A multi-layer perceptron with ReLU.

    `MLP(1, 1)` is the MAML paper's sinusoid regressor; `MLP(784, way, hidden=(256, 128, 64, 64),
    norm="transductive", norm_scale=False)` its fully connected Omniglot network. Parameters:
    `dense/i/kernel` (`dense/i/bias`), with a norm `norm/i/offset` (`norm/i/scale`), `head/kernel`,
    `head/bias`.

    Args:
        num_inputs: numbers per example, once flattened.
        num_outputs: outputs per example.
        hidden: sizes of the hidden layers; `()` gives a linear model.
        norm: the normalisation between each hidden layer and its ReLU: a policy of
            `jaxmaml.nn.norm`, as in `Conv4`, or None, which is "none".
        norm_scale: whether normalisation learns a scale beside its offset.
        num_steps: the number of inner steps, for norm="per_step" and only for it.
        per_step_weights: whether norm="per_step" learns an offset and a scale for each step too.
        hidden_init: initialiser of the hidden layers' kernels; LeCun normal unless told. The
            paper's code uses `nnx.initializers.truncated_normal(0.01)`, for the head too.
        head_init: initialiser of the head's kernel; LeCun normal unless told.
        hidden_bias: whether hidden layers have a bias; unless told, where the normalisation would
            not cancel it exactly, as batch statistics do.
        param_dtype: type of the parameters.
        rngs: source of the initial parameters.

    Raises:
        ValueError: if a size is not positive, or norm and num_steps are none that `make_norm` takes.

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
        check_positive(
            num_inputs=num_inputs, num_outputs=num_outputs, hidden=min(hidden, default=1)
        )
        default_init = nnx.initializers.lecun_normal()
        policy = "none" if norm is None else norm
        use_bias = not cancels_bias(policy) if hidden_bias is None else hidden_bias
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
        new_norm = functools.partial(
            make_norm, policy, scale=norm_scale, num_steps=num_steps,
            per_step_weights=per_step_weights, param_dtype=param_dtype,
        )  # fmt: skip
        self.norm = nnx.List(new_norm(size) for size in hidden)
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
        return self.head(self.features(inputs, weights))

    def features(self, inputs: Array, weights: Array | None = None) -> Array:
        """What the head sees of a batch, `[num_examples, hidden[-1]]`; without hidden layers, all.

        Inputs, weights and errors are those of a call.
        """
        shape = jnp.shape(inputs)
        if not shape or math.prod(shape[1:]) != self.num_inputs:
            raise ValueError(
                f"inputs must be [num_examples, ...] with {self.num_inputs} numbers per example, "
                f"got shape {shape}"
            )
        features = inputs if weights is None else blank_padding(inputs, weights)
        features = features.reshape(shape[0], self.num_inputs)
        for layer, normalise in zip(self.dense, self.norm, strict=True):
            features = jax.nn.relu(normalise(layer(features), weights))
        return features
