"""Memory of meta-gradients of large language models, compiled for a device that need not be there.

`transformer.py --compile-only` measures with this module. XLA reports what a compiled program needs; no
array is made and nothing runs.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import language_model
import optax
from jax.experimental import topologies
from language_model import Model

import jaxmaml
from jaxmaml import Exact, FirstOrder
from jaxmaml.adjoints import Adjoint
from jaxmaml.types import Array, Params, Task

GIB = 2**30
COLUMNS = [
    "model", "num_inner_steps", "variant", "arguments", "results", "temporary", "total",
    "estimate",
]  # fmt: skip
"""Columns of the table; sizes are in GiB."""


class Variant(NamedTuple):
    """A way to compute a meta-gradient.

    Attributes:
        adjoint: how the inner loop is differentiated.
        adapts: "all" parameters, or low-rank matrices "lora".
        learns: what the meta-gradient belongs to: "all" parameters, or "lora".
        inside: the type of the parameters inside of the inner loop; those outside are float32.
        compute: the type in which the blocks are computed.
    """

    adjoint: Adjoint
    adapts: str = "all"
    learns: str = "all"
    inside: Any = jnp.float32
    compute: Any = jnp.float32


EVERY = Exact(checkpoint_every=1)
BF16 = jnp.bfloat16
VARIANTS = {
    "first order": Variant(FirstOrder()),
    "grad of grad": Variant(Exact(mode="reverse")),
    "exact": Variant(Exact()),
    "exact, checkpoint_every=1": Variant(EVERY),
    "the same, bfloat16 activations": Variant(EVERY, compute=BF16),
    "the same, bfloat16 parameters inside": Variant(EVERY, inside=BF16, compute=BF16),
    "first order, bfloat16 parameters inside": Variant(FirstOrder(), inside=BF16, compute=BF16),
    "LoRA adapted, all learned": Variant(Exact(), adapts="lora", compute=BF16),
    "LoRA adapted and learned": Variant(Exact(), adapts="lora", learns="lora", compute=BF16),
    "the same, grad of grad": Variant(
        Exact(mode="reverse"), adapts="lora", learns="lora", compute=BF16
    ),
}


class Target(NamedTuple):
    """The device to compile for, and options of its compiler."""

    device: Any
    options: dict[str, Any]


def find_target(name: str) -> Target:
    """Returns a target.

    Args:
        name: "cpu"; "h100", which needs the packages jax-cuda12-plugin and nvidia-cuda-nvcc-cu12 but
            no GPU; or a topology of TPUs such as "v5p:2x2x1", which needs libtpu but no TPU.
    """
    if name == "cpu":
        # Memory is decided before machine code is made: this only saves time.
        fast = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        return Target(jax.local_devices(backend="cpu")[0], fast)
    if name == "h100":
        config = Path(__file__).with_name("h100.txtpb").read_text()
        found = topologies.get_topology_desc("", "cuda", target_config=config, topology="1x1x1")
        return Target(found.devices[0], {"xla_gpu_autotune_level": 0})
    return Target(topologies.get_topology_desc(name, "tpu").devices[0], {})


def measure(model: Model, num_inner_steps: int, variant: Variant, target: Target) -> dict[str, Any]:
    """Returns a row: the GiB of arguments, results and temporary memory, and their sum."""
    function, arguments = meta_grad(model, num_inner_steps, variant)
    sharding = jax.sharding.SingleDeviceSharding(target.device)
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    lowered = jax.jit(function).lower(*jax.tree.map(place, arguments))
    analysis = lowered.compile(compiler_options=target.options).memory_analysis()
    assert analysis is not None
    sizes = {
        "arguments": analysis.argument_size_in_bytes / GIB,
        "results": analysis.output_size_in_bytes / GIB,
        "temporary": analysis.temp_size_in_bytes / GIB,
    }
    return {
        **sizes, "total": sum(sizes.values()),
        "estimate": estimate(model, num_inner_steps, variant) / GIB,
    }  # fmt: skip


def meta_grad(
    model: Model, num_inner_steps: int, variant: Variant
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns the meta-gradient of one task, and the shapes of its arguments."""
    tokens = jax.ShapeDtypeStruct((1, model.sequence + 1), jnp.int32)
    base, lora = language_model.base_shapes(model), {}
    if variant.adapts == "lora":
        lora = language_model.lora_shapes(model)
    learned, frozen = {"base": base, "lora": lora}, {}
    if variant.learns == "lora":
        learned, frozen = {"lora": lora}, {"base": base}
    function = functools.partial(_meta_loss, num_inner_steps, variant)
    return jax.grad(function), (learned, frozen, Task(tokens, tokens))


def _meta_loss(
    num_inner_steps: int, variant: Variant, learned: Params, frozen: Params, task: Task
) -> Array:
    """The meta-loss. What is not learned is closed over: no gradient of it is computed."""
    cast = lambda leaf: leaf.astype(variant.inside)
    learned, frozen = jax.tree.map(cast, (learned, frozen))

    def loss_fn(params: Params, tokens: Array) -> Array:
        parts = frozen | params
        return language_model.loss_fn(parts["base"], parts["lora"], tokens, variant.compute)

    mask = None if variant.adapts == "all" else lambda path: path.startswith("lora/")
    optimizer = optax.adam(1e-4, eps_root=1e-16)
    learner = jaxmaml.maml(loss_fn, optimizer, num_inner_steps, adjoint=variant.adjoint, mask=mask)
    return learner.loss(learned, task)[0]


def estimate(model: Model, num_inner_steps: int, variant: Variant) -> float:
    """Returns the bytes that the method must hold, by arithmetic, without activations.

    The master parameters and their meta-gradient; of each inner step the parameters and two moments,
    and the gradient unless it is recomputed; and in the backward pass of a step, of what is adapted:
    three cotangents, the three arrays of that step, its gradient and the derivative along it.
    """
    base = common.num_bytes(language_model.base_shapes(model))
    lora = common.num_bytes(language_model.lora_shapes(model)) if variant.adapts == "lora" else 0
    learned = lora if variant.learns == "lora" else base + lora
    adapted = lora or base
    inside = jnp.dtype(variant.inside).itemsize / 4
    if isinstance(variant.adjoint, FirstOrder):
        kept = 3  # the parameters and moments of the step at hand; a few scalars of each step
    else:
        per_step = 3 if variant.adjoint == EVERY else 4
        kept = per_step * num_inner_steps + 8
    # A gradient of what is learned but not adapted is summed over the steps.
    summed = 2 * (learned - adapted) if learned > adapted else 0
    cast = base + lora if variant.inside != jnp.float32 else 0
    return base + lora + learned + inside * (kept * adapted + summed + cast)


def cases(options: Any) -> list[tuple[str, Model, int, str]]:
    """Returns (name of the model, model, number of inner steps, name of the variant)."""
    if options.quick:
        return [
            ("quick", language_model.QUICK, 2, name)
            for name in ("exact", "LoRA adapted and learned")
        ]
    chosen = options.models or list(language_model.MODELS)
    variants = options.variants or list(VARIANTS)
    return [
        (name, language_model.MODELS[name], number, variant)
        for name in chosen for number in sorted(options.inner_steps) for variant in variants
    ]  # fmt: skip


def main(options: Any) -> None:
    """Measures, appends and prints the rows."""
    try:
        target = find_target(options.target)
    except (RuntimeError, ValueError) as error:  # JAX raises both, and NotImplementedError
        reason = str(error).split("\n", maxsplit=1)[0][:200]
        print(f"error: --target {options.target}: {reason}", file=sys.stderr)
        sys.exit(2)
    rows = common.Rows(options, benchmark="transformer", table="compile-only")
    found = []
    for name, model, number, variant in cases(options):
        case = {
            "target": options.target, "model": name, **model._asdict(),
            "num_inner_steps": number, "variant": variant,
        }  # fmt: skip
        found += rows.of(case, functools.partial(measure, model, number, VARIANTS[variant], target))
        common.print_table(found[-1:], COLUMNS)
    print(f"\nGiB, compiled for {options.target}, not run\n")
    common.print_table(found, COLUMNS)
