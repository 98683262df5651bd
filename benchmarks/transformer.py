"""Memory of meta-learning the initial parameters of a Transformer language model, with Adam inside.

    python benchmarks/transformer.py
    python benchmarks/transformer.py --layers 12 --width 768 --sequence 1024 --support 1 --query 1
    python benchmarks/transformer.py --compile-only --models 1.3B --target h100

The tables have XLA's temporary memory of one task's meta-gradient, which needs no run: reverse over
reverse, the same with each inner step under jax.checkpoint, forward over reverse, and first order. The
model is decoder-only and pre-norm, with learned positions. Each block is under jax.checkpoint, so the
model's own gradient is already frugal.

--compile-only measures models of 125M to 1.3B parameters (large_models.py), for the device --target.
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import language_model
import large_models
import numpy as np
import optax

import jaxmaml
from jaxmaml import Exact, FirstOrder
from jaxmaml.adjoints import Adjoint
from jaxmaml.types import Array, Params, Task

SIDES: dict[str, Adjoint] = {
    "first order": FirstOrder(),
    "forward over reverse": Exact(),
    "checkpoint_every=1": Exact(checkpoint_every=1),
    "checkpoint": Exact(mode="checkpoint"),
    "reverse": Exact(mode="reverse"),
}
FIRST, OURS = "first order", "forward over reverse"
NUM_INNER_STEPS = (2, 4, 8)
HEAD_WIDTH = 64


class Size(NamedTuple):
    """The size of a model and of its tasks.

    Attributes:
        layers: blocks of the model.
        width: width of the model.
        sequence: tokens per sequence.
        support: support sequences.
        query: query sequences.
        vocabulary: different tokens.
    """

    layers: int
    width: int
    sequence: int
    support: int
    query: int
    vocabulary: int = 1000


SMALL_SIZES = (Size(2, 256, 256, 1, 1), Size(4, 256, 256, 1, 1), Size(2, 512, 256, 1, 1))
"""What is stored of each inner step is most of the memory: growth is judged here."""
LONG_SIZES = (Size(2, 256, 1024, 4, 4), Size(2, 256, 1024, 4, 8), Size(2, 256, 1024, 4, 16))
"""Activations are most of the memory, for first order too. An exact step on the support holds values
and tangents, twice what first order holds, which matters unless the query is larger."""
LARGE_SIZES = (Size(6, 512, 512, 4, 4), Size(12, 768, 1024, 1, 1))
TIMED_SIZE = Size(2, 256, 256, 1, 1)
QUICK_SIZE = Size(1, 64, 32, 1, 2, vocabulary=50)


def main() -> None:
    """Measures, appends and prints the rows."""
    # Measure and append.
    options = _options()
    if options.compile_only:
        large_models.main(options)
        return
    sides = [FIRST, OURS] if options.quick else list(SIDES)
    memory, rows = [], functools.partial(common.Rows, options, benchmark="transformer")
    for size, number in _cases(options):
        case = {**size._asdict(), "num_inner_steps": number}
        memory += rows(table="memory").of(
            case, functools.partial(measure_memory, size, number, sides)
        )
    sizes = [[*size, number] for size, number in _cases(options)]  # else --resume takes other ones
    grown = rows(table="growth").of({"cases": sizes}, lambda: growth(memory))
    timed_size, rounds = (QUICK_SIZE, 2) if options.quick else (TIMED_SIZE, 9)
    timed = rows(table="time").of(
        timed_size._asdict(), lambda: measure_time(timed_size, 4, rounds, sides)
    )

    # Print.
    fields = list(Size._fields)
    print("\nTemporary memory in units of the parameters\n")
    common.print_table(memory, [*fields, "num_inner_steps", *sides, "exact / first"])
    print("\nGrowth per inner step in units of the parameters and Adam's state\n")
    common.print_table(grown, [*fields, "inner steps", *sides[1:]])
    print("\nMilliseconds\n")
    common.print_table(timed, [*fields, "num_inner_steps", *sides])


def init_params(size: Size, key: Array) -> Params:
    """Returns embeddings `[vocabulary, width]` (also the output), positions and a list of blocks."""
    # One key per matrix: two embeddings, and four in each block.
    keys = iter(jax.random.split(key, 2 + 4 * size.layers))
    draw = lambda *shape: 0.02 * jax.random.normal(next(keys), shape)
    d = size.width

    def block() -> Params:
        return {
            "norm_in": jnp.ones(d), "qkv": draw(d, 3 * d), "out": draw(d, d),
            "norm_mlp": jnp.ones(d), "up": draw(d, 4 * d), "down": draw(4 * d, d),
        }  # fmt: skip

    return {
        "tokens": draw(size.vocabulary, d),
        "positions": draw(size.sequence, d),
        "blocks": [block() for _ in range(size.layers)],
        "norm": jnp.ones(d),
    }


def loss_fn(params: Params, tokens: Array) -> Array:
    """Returns the mean cross-entropy of the next token; tokens `[num_sequences, sequence + 1]`."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    x = params["tokens"][inputs] + params["positions"]
    for block in params["blocks"]:
        x = _block(x, block)
    logits = _norm(x, params["norm"]) @ params["tokens"].T
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def meta_grad(num_inner_steps: int, adjoint: Adjoint) -> Callable[[Params, Task], Any]:
    """Returns `(params, task) -> (meta-gradient, info)` with Adam inside."""
    optimizer = optax.adam(1e-4, eps_root=1e-8)
    learner = jaxmaml.maml(loss_fn, optimizer, num_inner_steps, adjoint=adjoint)
    return jax.grad(learner.loss, has_aux=True)


def shapes(size: Size) -> tuple[Params, Task]:
    """Returns the shapes of the parameters and of a task; nothing is computed."""
    tokens = lambda num: jax.ShapeDtypeStruct((num, size.sequence + 1), jnp.int32)
    params = jax.eval_shape(lambda: init_params(size, jax.random.key(0)))
    return params, Task(tokens(size.support), tokens(size.query))


def measure_memory(size: Size, num_inner_steps: int, sides: Sequence[str]) -> dict[str, Any]:
    """Returns a row: the temporary bytes of some sides, and the same in units of the parameters."""
    params, task = shapes(size)
    found = {
        name: common.compiled(meta_grad(num_inner_steps, SIDES[name]), params, task).temp_bytes
        for name in sides
    }
    unit = common.num_bytes(params)
    return {
        "params_bytes": unit,
        "temp_bytes": found, **{name: value / unit for name, value in found.items()},
        "exact / first": found[OURS] / found[FIRST],
    }  # fmt: skip


def growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row per pair of neighboring rows of one size: the bytes per added inner step.

    They are in units of the parameters and Adam's two moments.
    """
    found = []
    for before, after in itertools.pairwise(rows):
        num_added = after["num_inner_steps"] - before["num_inner_steps"]
        if num_added <= 0:  # another size begins
            continue
        unit = 3 * after["params_bytes"]
        per_step = common.growth_per_step(
            before["temp_bytes"], after["temp_bytes"], num_added, unit
        )
        sizes = {name: after[name] for name in Size._fields}
        steps = f"{before['num_inner_steps']} to {after['num_inner_steps']}"
        per_step = {name: each for name, each in per_step.items() if name != FIRST}
        found.append({**sizes, "inner steps": steps, **per_step})
    return found


def measure_time(
    size: Size, num_inner_steps: int, rounds: int, sides: Sequence[str]
) -> dict[str, Any]:
    """Returns a row: the milliseconds of some sides, timed in turn."""
    # Parameters and a task.
    params = init_params(size, jax.random.key(0))
    rng = np.random.default_rng(0)
    draw = lambda shape: jnp.asarray(rng.integers(size.vocabulary, size=shape.shape), jnp.int32)
    task = jax.tree.map(draw, shapes(size)[1])

    # The meta-gradient of every side.
    runs = {
        name: common.compiled(meta_grad(num_inner_steps, SIDES[name]), params, task).run
        for name in sides
    }
    seconds = common.alternate(runs, rounds)
    milliseconds = {name: 1e3 * float(np.median(took)) for name, took in seconds.items()}
    return {"num_inner_steps": num_inner_steps, "unit": "ms", **milliseconds}


def _norm(x: Array, scale: Array) -> Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def _attention(x: Array, block: Params) -> Array:
    batch, sequence, width = x.shape
    heads = (batch, sequence, 3, width // HEAD_WIDTH, HEAD_WIDTH)
    q, k, v = jnp.moveaxis((x @ block["qkv"]).reshape(heads), 2, 0)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / HEAD_WIDTH**0.5
    scores = jnp.where(jnp.tril(jnp.ones((sequence, sequence), bool)), scores, -1e9)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    return mixed.reshape(x.shape) @ block["out"]


@jax.checkpoint
def _block(x: Array, block: Params) -> Array:
    x = x + _attention(_norm(x, block["norm_in"]), block)
    return x + jax.nn.gelu(_norm(x, block["norm_mlp"]) @ block["up"]) @ block["down"]


def _options() -> argparse.Namespace:
    parser = common.parser(__doc__)
    for name in Size._fields:
        parser.add_argument(
            f"--{name}", type=int, help="measures one size only, which this option changes"
        )
    parser.add_argument("--inner-steps", type=int, nargs="+", default=NUM_INNER_STEPS)
    parser.add_argument("--large", action="store_true", help="measures the largest sizes too")
    parser.add_argument(
        "--compile-only", action="store_true", help="memory of large models, compiled but not run"
    )
    parser.add_argument(
        "--target", default="cpu",
        help="with --compile-only: cpu, h100 or a TPU topology such as v5p:2x2x1",
    )  # fmt: skip
    parser.add_argument(
        "--models", nargs="+", choices=language_model.MODELS, help="with --compile-only"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=large_models.VARIANTS, help="with --compile-only"
    )
    return parser.parse_args()


def _cases(options: argparse.Namespace) -> list[tuple[Size, int]]:
    """Returns (size, number of inner steps).

    Sizes at which growth is judged come with every number of inner steps, other sizes with the
    largest number.
    """
    # One size.
    steps = sorted(options.inner_steps)
    given = {name: getattr(options, name) for name in Size._fields}
    given = {name: value for name, value in given.items() if value is not None}
    if options.quick or given:
        size = (QUICK_SIZE if options.quick else SMALL_SIZES[0])._replace(**given)
        return [(size, number) for number in (steps[:2] if options.quick else steps)]

    # All sizes.
    others = [*LONG_SIZES, *(LARGE_SIZES if options.large else ())]
    small = [(size, number) for size in SMALL_SIZES for number in steps]
    return [*small, *((size, steps[-1]) for size in others)]


if __name__ == "__main__":
    main()
