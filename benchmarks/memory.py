"""XLA's temporary memory of the meta-gradient, which no noise of the machine changes.

The first tables take Conv4 (max-pooling, 64 filters, 28x28) on 5-way 5-shot tasks with 15 query images
a class, SGD inside, one task at a time on one device. The last takes every preset.

    python benchmarks/memory.py
"""

import argparse
import itertools
from typing import Any

import common
import jax
import numpy as np
import optax
from jaxmaml.train import experiment, presets

import jaxmaml
from jaxmaml.data import pools, sources
from jaxmaml.types import Params, Task

MIB = 2**20
SIDES: dict[str, dict[str, Any]] = {
    "first order": {"order": "first"},
    "exact": {"adjoint": "forward_over_reverse"},
    "checkpoint": {"adjoint": "checkpoint"},
    "reverse": {"adjoint": "reverse"},
}
NUM_INNER_STEPS = (1, 2, 5, 10, 20, 50)
MOST_REVERSE_STEPS = 20
"""Plain reverse over reverse takes gigabytes beyond."""
JUDGED_STEPS = 20
NOTEWORTHY = 1.5
SMALL_QUERY = "query no larger than support, whose values and tangents an exact step holds at once"
SMALL_NETWORK = (
    "parameters outweigh activations: each task holds its own, a cotangent and a product"
)


def temp_bytes(learner: Any, params: Params, tasks: Task, chunk_size: Any) -> int:
    """Temporary bytes of the compiled meta-gradient; shapes will do."""

    def run(params, tasks):
        return jaxmaml.meta_grad(learner, params, tasks, chunk_size=chunk_size)[:2]

    return common.compiled(run, params, tasks)[1]


def measure_steps(num_inner_steps: tuple[int, ...], **network: Any) -> list[dict[str, Any]]:
    """One row a number of inner steps: MiB of every side, and the growth of ours."""
    loss_fn, params = common.conv4(5, pooled=True, **network)
    tasks = common.image_tasks(2, 5, 5, 15)
    unit = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    rows = []
    for number in num_inner_steps:
        found = {}
        for name, options in SIDES.items():
            if name == "reverse" and number > MOST_REVERSE_STEPS:
                continue
            learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), number, **options)
            found[name] = temp_bytes(learner, params, tasks, 1)
        rows.append({"inner steps": number, "params_bytes": unit, "temp_bytes": found})
    for before, after in itertools.pairwise(rows):
        added = after["inner steps"] - before["inner steps"]
        grown = after["temp_bytes"]["exact"] - before["temp_bytes"]["exact"]
        after["growth"] = grown / added / unit
    return [row | {name: b / MIB for name, b in row["temp_bytes"].items()} for row in rows]


def verdicts(rows: list[dict[str, Any]], judged: int) -> list[dict[str, Any]]:
    """The figures that must be reached."""
    found = next(row["temp_bytes"] for row in rows if row["inner steps"] == judged)
    growth = max(row["growth"] for row in rows if "growth" in row)
    steps = f"{judged} inner steps"
    figures = [
        (f"exact / first order, {steps}", found["exact"] / found["first order"], "<=", 1.15),
        ("growth per inner step / parameters", growth, "<=", 1.1),
        (f"reverse / exact, {steps}", found["reverse"] / found["exact"], ">=", 10.0),
    ]
    return [
        {"figure": name, "value": value, "must": f"{sign} {bound:g}",
         "reached": "yes" if (value <= bound) == (sign == "<=") else "no"}
        for name, value, sign, bound in figures
    ]  # fmt: skip


def _blank_classes(preset: presets.Preset) -> dict[str, pools.Pool]:
    """As many blank images as a task needs, in place of the data set."""
    per_class = preset.shot + max(preset.query, preset.test_query)
    labels = np.repeat(np.arange(preset.way), per_class)
    shape = (28, 28, 1) if preset.is_regression else sources.DATASETS[preset.dataset].format.shape
    images = np.zeros((len(labels), *shape), np.uint8)
    pool = pools.from_arrays(images, labels, [str(i) for i in range(preset.way)])
    return dict.fromkeys(("train", "val", "test"), pool)


def measure_preset(preset: presets.Preset) -> dict[str, Any]:
    """MiB of first order and exact, at the preset's chunk size and with all tasks at once."""
    built = experiment.build(preset, seed=0, num_test_tasks=1, classes=_blank_classes(preset))
    tasks = jax.eval_shape(built.sources["train"], built.train_key)
    row: dict[str, Any] = {
        "preset": preset.name, "inner steps": preset.num_inner_steps, "tasks": preset.num_tasks,
        "chunk size": preset.chunk_size,
    }  # fmt: skip
    for label, size in (("", experiment.chunk_size(preset)), (", all tasks", None)):
        for order in ("first", "exact"):
            learner = experiment.learner(built, experiment.Spec(order, order, preset.inner_lr))
            row[f"{order}{label}"] = temp_bytes(learner, built.params, tasks, size) / MIB
        row[f"exact / first{label}"] = row[f"exact{label}"] / row[f"first{label}"]
    above = max(row["exact / first"], row["exact / first, all tasks"]) > NOTEWORTHY
    return {**row, "reason": _reason(row, built.params) if above else None}


def _reason(row: dict[str, Any], params: Params) -> str:
    """First order holds the parameters of each task once; that shows where activations are small."""
    per_task = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) * row["tasks"] / MIB
    return SMALL_NETWORK if per_task > row["first, all tasks"] / 2 else SMALL_QUERY


def main() -> None:
    """Measures, prints and appends the rows, each as soon as it is there: it takes minutes."""
    parser = common.parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--table", nargs="+", choices=["steps", "presets"], default=None)
    options = parser.parse_args()
    tables = options.table or ["steps", "presets"]
    if "steps" in tables:
        _steps_table(options)
    if "presets" in tables:
        _presets_table(options)


def _steps_table(options: argparse.Namespace) -> None:
    numbers = (1, 2, 5) if options.quick else NUM_INNER_STEPS
    rows = measure_steps(numbers, num_filters=8 if options.quick else 64)
    judged = verdicts(rows, numbers[-1] if options.quick else JUDGED_STEPS)
    for table, found in (("steps", rows), ("must", judged)):
        common.emit([{"benchmark": "memory", "table": table, **row} for row in found], options.out)
    print("Conv4 pooled, 5w5s, 15 query, one task at a time: MiB\n")
    common.print_table(rows, ["inner steps", *SIDES, "growth"])
    print()
    common.print_table(judged, ["figure", "value", "must", "reached"])


def _presets_table(options: argparse.Namespace) -> None:
    names = ["sinusoid-5shot", "glyphs-5w1s"] if options.quick else list(presets.PRESETS)
    rows = []
    for name in names:
        rows.append(measure_preset(presets.get(name)))
        common.emit([{"benchmark": "memory", "table": "presets", **rows[-1]}], options.out)
        print(f"{name} done", flush=True)
    print("\nPresets: MiB\n")
    columns = [name for name in rows[0] if name != "reason"]
    common.print_table(rows, [*columns, "reason"])


if __name__ == "__main__":
    main()
