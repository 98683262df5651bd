"""Forms of a convolution in which each task has its own weights, at the shapes of Conv4.

    python benchmarks/convolution.py

The tables have GFLOP/s of the value and the gradients with respect to images and kernel (three
products), beside the machine's rate for a large float32 matrix product. "own" has one kernel per task,
under vmap or under a scan over tasks, as with chunk_size=1; "shared" has one kernel for all tasks, as
in the first inner step.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmaml import nn

WEIGHTINGS = ("own, vmap", "own, scan", "shared")
NUM_TASKS = 8
NUM_EXAMPLES = {28: 25, 84: 5}
"""Images of a task, by the side of an image: 5-way 5-shot, or 1-shot for large images."""


def patches(inputs: Any, kernel: Any, stride: int) -> Any:
    """Computes patches times a matrix, as `nn.conv` does."""
    return nn.conv(inputs, kernel, stride=stride)


def shifted(inputs: Any, kernel: Any, stride: int) -> Any:
    """Sums nine products, one for each position of the kernel."""
    height, width, channels, num_filters = kernel.shape
    pads = lax.padtype_to_pads(inputs.shape[1:3], (height, width), (stride, stride), "SAME")
    padded = jnp.pad(inputs, [(0, 0), *pads, (0, 0)])
    rows, columns = padded.shape[1:3]
    parts = [
        padded[:, i : rows - height + i + 1 : stride, j : columns - width + j + 1 : stride]
        for i in range(height)
        for j in range(width)
    ]
    matrices = kernel.reshape(-1, channels, num_filters)
    products = [part.reshape(-1, channels) @ w for part, w in zip(parts, matrices, strict=True)]
    return functools.reduce(jnp.add, products).reshape(*parts[0].shape[:3], num_filters)


def lax_conv(inputs: Any, kernel: Any, stride: int) -> Any:
    """Calls XLA's convolution, which vmap over kernels turns into a grouped one."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        inputs, kernel, (stride, stride), "SAME", dimension_numbers=numbers
    )


FORMS: dict[str, Callable[..., Any]] = {
    "patches": patches,
    "shifted": shifted,
    "lax.conv": lax_conv,
}


class Layer(NamedTuple):
    """A convolution of a network.

    Attributes:
        network: the name of the network.
        image_side: height and width of an image, the input of the network.
        side: height and width of the layer's input.
        channels: channels of the layer's input.
        filters: channels of its output.
        stride: its stride.
    """

    network: str
    image_side: int
    side: int
    channels: int
    filters: int
    stride: int


def layers(quick: bool) -> list[Layer]:
    """Returns the first three layers of each variant of Conv4, whose last two are alike."""
    if quick:
        return [Layer("28x28 stride 2", 28, 7, 8, 8, 2)]
    networks = [("28x28 stride 2", 28, 2), ("28x28 pooled", 28, 1), ("84x84 pooled", 84, 1)]
    found = []
    for filters in (32, 64):
        for name, image_side, stride in networks:
            for depth in range(3):
                # A stride of 2 rounds up, pooling rounds down.
                side = -(-image_side // 2**depth) if stride == 2 else image_side // 2**depth
                channels = filters if depth else 3 if image_side == 84 else 1
                found.append(Layer(name, image_side, side, channels, filters, stride))
    return found


def cases(form: Callable[..., Any], stride: int) -> dict[str, Callable[..., Any]]:
    """Returns {weighting: function of images, kernels and cotangents}: the value and the gradients.

    Args:
        form: a form of the convolution.
        stride: its stride.

    Returns:
        Functions of images `[num_tasks, num_examples, ...]`, kernels `[num_tasks, ...]` and
        cotangents `[num_tasks, num_examples, ...]`.
    """

    def both(inputs: Any, kernel: Any, cotangent: Any) -> Any:
        outputs, pull = jax.vjp(lambda x, w: form(x, w, stride), inputs, kernel)
        return outputs, pull(cotangent)

    scanned = lambda *args: lax.map(lambda task: both(*task), args)
    shared = lambda x, w, c: both(x.reshape(-1, *x.shape[2:]), w[0], c.reshape(-1, *c.shape[2:]))
    return dict(zip(WEIGHTINGS, (jax.vmap(both), scanned, shared), strict=True))


def measure(layer: Layer, rounds: int, rate: float) -> list[dict[str, Any]]:
    """Returns a row per weighting: the GFLOP/s of every form, and the best form.

    Args:
        layer: the convolution.
        rounds: turns of each form.
        rate: FLOP/s of a large matrix product.
    """
    # Inputs.
    rng = np.random.default_rng(0)
    draw = lambda *size: jnp.asarray(rng.normal(size=size), jnp.float32)
    num_examples, out = NUM_EXAMPLES[layer.image_side], -(-layer.side // layer.stride)
    inputs = draw(NUM_TASKS, num_examples, layer.side, layer.side, layer.channels)
    kernels = draw(NUM_TASKS, 3, 3, layer.channels, layer.filters)
    cotangents = draw(NUM_TASKS, num_examples, out, out, layer.filters)
    flops = 3 * 2 * NUM_TASKS * num_examples * out**2 * 9 * layer.channels * layer.filters

    # Every form, in turn.
    rows = []
    for weighting in WEIGHTINGS:
        sides = {}
        for name, form in FORMS.items():
            if not _is_hopeless(name, weighting):
                case = cases(form, layer.stride)[weighting]
                sides[name] = common.compiled(case, inputs, kernels, cotangents).run
        seconds = common.alternate(sides, rounds)
        gflops = {form: flops / float(np.median(took)) / 1e9 for form, took in seconds.items()}
        best = max(gflops, key=gflops.__getitem__)
        rows.append({
            "weights": weighting, **gflops, "best": best, "of limit": gflops[best] * 1e9 / rate,
        })  # fmt: skip
    return rows


def _is_hopeless(form: str, weighting: str) -> bool:
    """Returns whether a form is left out: a grouped convolution takes minutes on a CPU."""
    return jax.default_backend() == "cpu" and form == "lax.conv" and weighting != "shared"


def main() -> None:
    """Measures, prints and appends the rows."""
    options = common.parser(__doc__).parse_args()
    rate = common.matmul_rate(256 if options.quick else 2048)
    print(f"a large float32 matrix product runs at {rate / 1e9:.0f} GFLOP/s here")
    rows, table = [], common.Rows(options)
    for layer in layers(options.quick):
        measured = functools.partial(measure, layer, 2 if options.quick else 7, rate)
        rows += table.of(layer._asdict(), measured)
    columns = ["network", "side", "channels", "filters", "weights", *FORMS, "best", "of limit"]
    common.print_table(rows, columns)


if __name__ == "__main__":
    main()
