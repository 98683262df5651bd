"""Forms of a convolution with weights of each task's own, at the shapes of Conv4.

GFLOP/s of value and gradient with respect to images and kernel (three products) against the machine's
rate for a large float32 matrix product. "own" has one kernel a task under vmap, or under a scan over
tasks as chunk_size=1 makes it; "shared" has one kernel for all, as in the first inner step.

    python benchmarks/convolution.py
"""

import functools
from collections.abc import Callable
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmaml import nn

NUM_TASKS = 8
NUM_EXAMPLES = {28: 25, 84: 5}
"""Images of a task by the side of the network's input: 5-way 5-shot, and 1-shot where they are large."""


def patches(inputs: Any, kernel: Any, stride: int) -> Any:
    """What `nn.conv` does: patches times a matrix."""
    return nn.conv(inputs, kernel, stride=stride)


def shifted(inputs: Any, kernel: Any, stride: int) -> Any:
    """A sum of nine products, one for each place of the kernel."""
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
    """XLA's convolution, which vmap over kernels turns into a grouped one."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        inputs, kernel, (stride, stride), "SAME", dimension_numbers=numbers
    )


FORMS: dict[str, Callable[..., Any]] = {
    "patches": patches,
    "shifted": shifted,
    "lax.conv": lax_conv,
}


def shapes(quick: bool) -> list[tuple[str, int, int, int, int]]:
    """(network, side, channels, filters, stride) of the layers of Conv4."""
    networks = [("28x28 stride 2", 28, 2), ("28x28 pooled", 28, 1), ("84x84 pooled", 84, 1)]
    if quick:
        return [("28x28 stride 2", 7, 8, 8, 2)]
    found = []
    for filters in (32, 64):
        for name, side, stride in networks:
            for layer in range(3):
                size = -(-side // 2**layer) if stride == 2 else side // 2**layer
                channels = filters if layer else 3 if side == 84 else 1
                found.append((name, size, channels, filters, stride))
    return found


def cases(form: Callable[..., Any], stride: int) -> dict[str, Callable[..., Any]]:
    """Value and gradient for images `[tasks, examples, ...]`, kernels `[tasks, ...]` and cotangents."""

    def both(inputs, kernel, cotangent):
        outputs, pull = jax.vjp(lambda x, w: form(x, w, stride), inputs, kernel)
        return outputs, pull(cotangent)

    scanned = lambda *args: lax.map(lambda task: both(*task), args)
    shared = lambda x, w, c: both(x.reshape(-1, *x.shape[2:]), w[0], c.reshape(-1, *c.shape[2:]))
    return {"own, vmap": jax.vmap(both), "own, scan": scanned, "shared": shared}


def measure(
    shape: tuple[str, int, int, int, int], rounds: int, rate: float
) -> list[dict[str, Any]]:
    """One row a weighting: every form's GFLOP/s and the best of them."""
    name, side, channels, filters, stride = shape
    rng = np.random.default_rng(0)
    draw = lambda *size: jnp.asarray(rng.normal(size=size), jnp.float32)
    out = -(-side // stride)
    num_examples = NUM_EXAMPLES[84 if name.startswith("84") else 28]
    inputs = draw(NUM_TASKS, num_examples, side, side, channels)
    kernels = draw(NUM_TASKS, 3, 3, channels, filters)
    cotangents = draw(NUM_TASKS, num_examples, out, out, filters)
    flops = 3 * 2 * NUM_TASKS * num_examples * out**2 * 9 * channels * filters
    rows = []
    for weighting in cases(patches, stride):
        sides = {
            form: common.compiled(cases(function, stride)[weighting], inputs, kernels, cotangents)[
                0
            ]
            for form, function in FORMS.items()
            if not _is_hopeless(form, weighting)
        }
        seconds = common.alternate(sides, rounds)
        gflops = {form: flops / float(np.median(took)) / 1e9 for form, took in seconds.items()}
        best = max(gflops, key=gflops.__getitem__)
        rows.append(
            {
                "network": name, "side": side, "channels": channels, "filters": filters,
                "weights": weighting, **gflops, "best": best, "of limit": gflops[best] * 1e9 / rate,
            }
        )  # fmt: skip
    return rows


def _is_hopeless(form: str, weighting: str) -> bool:
    """On CPU a grouped convolution takes minutes, and says nothing new."""
    return jax.default_backend() == "cpu" and form == "lax.conv" and weighting != "shared"


def main() -> None:
    """Measures, prints and appends the rows."""
    options = common.parser(__doc__ or "").parse_args()
    rate = common.matmul_rate(256 if options.quick else 2048)
    print(f"matrix product of size 2048: {rate / 1e9:.0f} GFLOP/s")
    rows = []
    for shape in shapes(options.quick):
        found = measure(shape, 2 if options.quick else 7, rate)
        common.emit(found, options.out)  # at once: the large shapes take minutes
        rows += found
    columns = ["network", "side", "channels", "filters", "weights", *FORMS, "best", "of limit"]
    common.print_table(rows, columns)


if __name__ == "__main__":
    main()
