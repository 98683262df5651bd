"""An outer step of Conv4 written in Equinox and in Linen, beside that of `nn.Conv4`.

    python benchmarks/frameworks.py

The models are wrapped in `nn.fast_convolutions`. The ratio is their time over that of `nn.Conv4`, which
has the same layers; "bytes" are XLA's temporary memory. With --plain the models are also timed as they
are, which takes minutes on a CPU.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import common
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import linen

import jaxmaml
from jaxmaml import nn
from jaxmaml.nn.normalizer import NORM_EPS
from jaxmaml.types import Array, ModelFn, Params

SIDE, WAY, NUM_LAYERS = 28, 5, 4


class Work(NamedTuple):
    """An outer step of two tasks.

    Attributes:
        network: "stride 2" or "pooled".
        shot: support examples per class.
        query: query examples per class.
        num_inner_steps: the number of inner steps.
    """

    network: str
    shot: int
    query: int
    num_inner_steps: int


WORKS = (Work("stride 2", 1, 1, 1), Work("stride 2", 1, 15, 1), Work("pooled", 5, 15, 5))


def normalize(images: Array, scale: Array, offset: Array, axis: int) -> Array:
    """Normalizes each channel by the statistics of the batch, as `nn.Conv4` does.

    Args:
        images: images of the batch.
        scale, offset: `[num_channels]`.
        axis: the axis of the channels.
    """
    axes = tuple(other for other in range(images.ndim) if other != axis)
    shape = [1] * images.ndim
    shape[axis] = -1
    mean = images.mean(axes, keepdims=True)
    variance = ((images - mean) ** 2).mean(axes, keepdims=True)
    factor = jax.lax.rsqrt(variance + NORM_EPS) * scale.reshape(shape)
    return images * factor + (offset.reshape(shape) - mean * factor)


class EquinoxConv4(eqx.Module):
    """Conv4 with channels first, each layer of one example under `vmap`, as Equinox has it."""

    convs: list[eqx.nn.Conv2d]
    scales: list[Array]
    offsets: list[Array]
    head: eqx.nn.Linear
    pooled: bool = eqx.field(static=True)

    def __init__(self, num_filters: int, pooled: bool):
        keys = jax.random.split(jax.random.key(0), NUM_LAYERS + 1)
        options: dict[str, Any] = {
            "stride": 1 if pooled else 2,
            "padding": "SAME",
            "use_bias": False,
        }
        channels = [1, *[num_filters] * (NUM_LAYERS - 1)]
        self.convs = [
            eqx.nn.Conv2d(size, num_filters, 3, **options, key=key)
            for size, key in zip(channels, keys[:-1], strict=True)
        ]
        self.scales = [jnp.ones(num_filters)] * NUM_LAYERS
        self.offsets = [jnp.zeros(num_filters)] * NUM_LAYERS
        self.head = eqx.nn.Linear(num_filters, WAY, key=keys[-1])
        self.pooled = pooled

    def __call__(self, images: Array) -> Array:
        """Returns the outputs for `[num_examples, height, width, 1]`."""
        images = images.transpose(0, 3, 1, 2)
        for conv, scale, offset in zip(self.convs, self.scales, self.offsets, strict=True):
            images = jax.nn.relu(normalize(jax.vmap(conv)(images), scale, offset, 1))
            images = jax.vmap(eqx.nn.MaxPool2d(2, 2))(images) if self.pooled else images
        return jax.vmap(self.head)(images.mean((2, 3)))


class LinenConv4(linen.Module):
    """Conv4 with channels last, as Linen has it."""

    num_filters: int
    pooled: bool

    @linen.compact
    def __call__(self, images: Array) -> Array:
        """Returns the outputs for `[num_examples, height, width, 1]`."""
        strides = 1 if self.pooled else 2
        for layer in range(NUM_LAYERS):
            images = linen.Conv(self.num_filters, (3, 3), strides, use_bias=False)(images)
            scale = self.param(f"scale_{layer}", linen.initializers.ones, (self.num_filters,))
            offset = self.param(f"offset_{layer}", linen.initializers.zeros, (self.num_filters,))
            images = jax.nn.relu(normalize(images, scale, offset, 3))
            images = linen.max_pool(images, (2, 2), (2, 2)) if self.pooled else images
        return linen.Dense(WAY)(images.mean((1, 2)))


def models(num_filters: int, pooled: bool) -> dict[str, tuple[ModelFn, Params]]:
    """Returns Conv4 in each framework, as (apply_fn, params)."""
    from flax import nnx

    module = LinenConv4(num_filters, pooled)
    variables = module.init(jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 1)))
    ours = nn.Conv4(WAY, num_filters=num_filters, pooled=pooled, rngs=nnx.Rngs(0))
    return {
        "nn.Conv4": nn.from_nnx(ours),
        "equinox": nn.from_equinox(
            EquinoxConv4(num_filters, pooled), lambda model, batch: model(batch["inputs"])
        ),
        "linen": nn.from_linen(module, variables),
    }


def measure(work: Work, quick: bool, plain: bool) -> list[dict[str, Any]]:
    """Returns a row per framework: the ms of an outer step, and the ratio to `nn.Conv4`."""
    pooled = work.network == "pooled"
    # The compiled outer steps.
    tasks = common.image_tasks(2, WAY, work.shot, work.query)
    forms: dict[str, Callable[[ModelFn], ModelFn]] = {"": nn.fast_convolutions}
    if plain:
        forms[", plain"] = lambda apply_fn: apply_fn
    sides = {}
    for name, (apply_fn, params) in models(8 if quick else 64, pooled).items():
        for label, form in forms.items() if name != "nn.Conv4" else [("", lambda fn: fn)]:
            loss_fn = nn.cross_entropy(form(apply_fn))
            learner = jaxmaml.maml(loss_fn, optax.sgd(0.05), work.num_inner_steps)
            run = lambda params, tasks, learner=learner: jaxmaml.meta_grad(learner, params, tasks)[
                :2
            ]
            sides[name + label] = common.compiled(run, params, tasks)

    # Every one, in turn.
    runs = {name: side.run for name, side in sides.items()}
    seconds = common.alternate(runs, 2 if quick else 15)
    return [
        {
            "model": name, "ms": 1e3 * min(seconds[name]), "MiB": side.temp_bytes / common.MIB,
            "ratio": common.median_ratio(seconds, name, "nn.Conv4"),
        }
        for name, side in sides.items()
    ]  # fmt: skip


def main() -> None:
    """Measures, prints and appends the rows."""
    parser = common.parser(__doc__)
    parser.add_argument("--plain", action="store_true", help="time the models as they are, too")
    options = parser.parse_args()
    rows, table = [], common.Rows(options, benchmark="frameworks", plain=options.plain)
    for work in WORKS[:1] if options.quick else WORKS:
        measured = functools.partial(measure, work, options.quick, options.plain)
        rows += table.of(work._asdict(), measured)
    common.print_table(rows, [*Work._fields, "model", "ms", "ratio", "MiB"])


if __name__ == "__main__":
    main()
