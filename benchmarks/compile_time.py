"""Time to trace, lower and compile the meta-gradient, and the size of its program.

    python benchmarks/compile_time.py --out compile_time.jsonl
    python benchmarks/compile_time.py --model mlp

The tasks are 5-way 1-shot with 15 query images per class, 32 of them, SGD inside. The first rows of a
model take more and more inner steps, the next ones more tasks at a time, and the last ones a loop
whose body holds several inner steps (`unroll`). The persistent compilation cache is off. Seconds depend
on the machine and on what else it does. The numbers of instructions do not: those that XLA is given
("lowered", where a function that is called twice counts once), and those of the program that it makes
("optimized").
"""

import argparse
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxmaml
from jaxmaml import Exact, FirstOrder, nn
from jaxmaml.adjoints import Adjoint
from jaxmaml.types import LossFn, Params, Task

WAY, SHOT, QUERY = 5, 1, 15
ADJOINTS: dict[str, Callable[..., Adjoint]] = {"exact": Exact, "first": FirstOrder}
COLUMNS = [
    *("model", "order", "inner_steps", "chunk_size", "unroll", "trace_s", "lower_s", "compile_s"),
    *("lowered", "optimized"),
]
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?[\w.-]+ = ", re.MULTILINE)
"""The start of a line of XLA's text of a program that is an instruction."""


class Case(NamedTuple):
    """A program.

    Attributes:
        model: the name of its model.
        order: its adjoint, "exact" or "first".
        inner_steps: inner steps.
        num_tasks: tasks.
        chunk_size: tasks at a time.
        unroll: inner steps in the body of the loop.
    """

    model: str
    order: str
    inner_steps: int
    num_tasks: int
    chunk_size: int
    unroll: int = 1


class Sizes(NamedTuple):
    """The sizes of the rows of a table.

    Attributes:
        inner_steps: numbers of inner steps, with one task at a time.
        usual_steps: the inner steps of the other rows.
        num_tasks: tasks.
        chunk_sizes: tasks at a time.
        unrolls: inner steps in the body of the loop, with the most inner steps.
    """

    inner_steps: tuple[int, ...] = (1, 5, 10, 50)
    usual_steps: int = 5
    num_tasks: int = 32
    chunk_sizes: tuple[int, ...] = (4, 32)
    unrolls: tuple[int, ...] = (5,)


QUICK = Sizes(inner_steps=(2, 20), usual_steps=2, num_tasks=4, chunk_sizes=(2,), unrolls=(4,))


def main() -> None:
    """Measures, appends and prints the rows."""
    options = _options()
    jax.config.update("jax_enable_compilation_cache", False)
    table, rows = common.Rows(options, benchmark="compile_time"), []
    for model in options.model:
        for case in cases(model, QUICK if options.quick else Sizes()):
            measured = functools.partial(measure, case, quick=options.quick)
            jax.clear_caches()  # nothing is left of what an earlier program traced
            rows += table.of(case._asdict(), measured)
    common.print_table(rows, COLUMNS)


def _options() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--model", nargs="+", choices=MODELS, help="defaults to all, or mlp with --quick"
    )
    options = parser.parse_args()
    options.model = options.model or (["mlp"] if options.quick else list(MODELS))
    return options


def cases(model: str, sizes: Sizes) -> list[Case]:
    """Returns the programs of a model: one size changes at a time."""
    make = functools.partial(Case, model, num_tasks=sizes.num_tasks)
    found = []
    for number in sizes.inner_steps:
        found += [make(order, number, chunk_size=1) for order in ADJOINTS]
    for chunk_size in sizes.chunk_sizes:
        found += [make(order, sizes.usual_steps, chunk_size=chunk_size) for order in ADJOINTS]
    for unroll in sizes.unrolls:
        most = max(sizes.inner_steps)
        found += [make(order, most, chunk_size=1, unroll=unroll) for order in ADJOINTS]
    return found


def measure(case: Case, *, quick: bool) -> dict[str, Any]:
    """Returns a row: the seconds of each stage, and the instructions before and after XLA.

    Args:
        case: the program.
        quick: whether the network and its images are small.
    """
    # The meta-gradient of shapes.
    (loss_fn, params), image_shape = MODELS[case.model](quick)
    adjoint = ADJOINTS[case.order](unroll=case.unroll)
    learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), case.inner_steps, adjoint=adjoint)
    tasks = Task(*(_batch(case.num_tasks, number, image_shape) for number in (SHOT, QUERY)))

    def run(params: Params, tasks: Task) -> Any:
        return jaxmaml.meta_grad(learner, params, tasks, chunk_size=case.chunk_size)[:2]

    # Its stages.
    held: dict[str, Any] = {}
    stages = {
        "trace": lambda: jax.jit(run).trace(params, tasks),
        "lower": lambda: held["trace"].lower(),
        "compile": lambda: held["lower"].compile(),
    }
    row: dict[str, Any] = {}
    for name, stage in stages.items():
        row[f"{name}_s"] = common.seconds_of(
            lambda name=name, stage=stage: held.update({name: stage()})
        )
    return row | {
        "lowered": num_instructions(held["lower"].as_text(dialect="hlo")),
        "optimized": num_instructions(held["compile"].as_text()),
    }


def num_instructions(text: str) -> int:
    """Returns the number of instructions in XLA's text of a program, over all its computations."""
    return len(INSTRUCTION.findall(text))


def _batch(num_tasks: int, num_per_class: int, image_shape: tuple[int, ...]) -> dict[str, Any]:
    shape = (num_tasks, WAY * num_per_class)
    return {
        "inputs": jax.ShapeDtypeStruct((*shape, *image_shape), jnp.float32),
        "targets": jax.ShapeDtypeStruct(shape, jnp.int32),
    }


def _mlp(quick: bool) -> tuple[tuple[LossFn, Params], tuple[int, ...]]:
    side, hidden = (8, (8,)) if quick else (28, (256, 128, 64, 64))
    module = nn.MLP(side * side, WAY, hidden=hidden, norm="transductive", rngs=nnx.Rngs(0))
    apply_fn, params = nn.from_nnx(module)
    return (nn.cross_entropy(apply_fn), params), (side, side, 1)


def _conv4(quick: bool, *, pooled: bool) -> tuple[tuple[LossFn, Params], tuple[int, ...]]:
    image_shape = (16, 16, 1) if quick else (28, 28, 1)
    num_filters = 4 if quick else 64
    made = common.conv4(WAY, pooled=pooled, image_shape=image_shape, num_filters=num_filters)
    return made, image_shape


def _resnet12(quick: bool) -> tuple[tuple[LossFn, Params], tuple[int, ...]]:
    image_shape = (16, 16, 3) if quick else (84, 84, 3)
    num_filters = (4, 4, 4, 4) if quick else (64, 128, 256, 512)
    module = nn.ResNet12(
        WAY, image_shape=image_shape, num_filters=num_filters, rngs=nnx.Rngs(0)
    )  # fmt: skip
    apply_fn, params = nn.from_nnx(module)
    return (nn.cross_entropy(apply_fn), params), image_shape


MODELS: dict[str, Callable[[bool], tuple[tuple[LossFn, Params], tuple[int, ...]]]] = {
    "mlp": _mlp,
    "conv4": functools.partial(_conv4, pooled=False),
    "conv4-pooled": functools.partial(_conv4, pooled=True),
    "resnet12": _resnet12,
}
"""Given whether it is small: (loss function, parameters), and the shape of an image."""


if __name__ == "__main__":
    main()
