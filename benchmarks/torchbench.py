"""The MAML workload of TorchBench, PyTorch's public benchmark suite, as jaxmaml computes it.

https://github.com/pytorch/benchmark, torchbenchmark/models/maml_omniglot: three blocks of 3x3
convolution without padding, with a bias and 64 filters, normalization by the statistics of the batch,
ReLU and 2x2 max-pooling, then a linear layer; 28x28 images, 5-way 5-shot with 15 query images per class,
32 tasks, five inner steps of 0.1 over all parameters, exact. Only the constant that the normalization
adds to the variance is another one, on both sides of a comparison: `jaxmaml.nn.normalizer.NORM_EPS`.
"""

import jax.numpy as jnp
from flax import nnx

from jaxmaml import nn
from jaxmaml.experiments import presets
from jaxmaml.experiments.presets import Preset
from jaxmaml.types import Array, LossFn, Params

NUM_BLOCKS = 3
PADDING = "VALID"

PRESET = presets.override(
    presets.get("glyphs-5w1s"), name="torchbench", shot=5, query=15, pooled=True, num_inner_steps=5,
    num_tasks=32, inner_lr=0.1,
)  # fmt: skip


class Conv(nnx.Module):
    """A 3x3 convolution without padding, with a bias."""

    def __init__(self, channels: int, num_filters: int, rngs: nnx.Rngs):
        init = nnx.initializers.xavier_uniform()
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, channels, num_filters)))
        self.bias = nnx.Param(jnp.zeros(num_filters))

    def __call__(self, inputs: Array) -> Array:
        """Returns the convolution of `[num_examples, height, width, channels]`."""
        return nn.conv(inputs, self.kernel[...], padding=PADDING) + self.bias[...].reshape(
            1, 1, 1, -1
        )


class Network(nnx.Module):
    """The network, with the parameter paths of `jaxmaml.nn.Conv4`."""

    def __init__(self, way: int, num_filters: int, rngs: nnx.Rngs):
        channels = [1, *[num_filters] * (NUM_BLOCKS - 1)]
        self.conv = nnx.List(Conv(number, num_filters, rngs) for number in channels)
        self.norm = nnx.List(nn.make_norm("transductive", num_filters) for _ in channels)
        self.head = nnx.Linear(num_filters, way, rngs=rngs)

    def __call__(self, inputs: Array) -> Array:
        """Returns the logits of `[num_examples, 28, 28, 1]`."""
        features = inputs
        for convolve, normalize in zip(self.conv, self.norm, strict=True):
            features = nn.normalize_and_pool([(convolve(features), normalize)])
        return self.head(features.reshape(features.shape[0], -1))


def network(preset: Preset) -> tuple[LossFn, Params]:
    """Returns (loss_fn, params) for the way and the number of filters of a preset."""
    module = Network(preset.way, preset.num_filters, nnx.Rngs(0))
    apply_fn, params = nn.from_nnx(module)
    return nn.cross_entropy(apply_fn), params
