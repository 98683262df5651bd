"""XLA's temporary memory of the meta-gradient, which does not depend on the noise of the machine.

    python benchmarks/memory.py

The first tables take Conv4 (max-pooling, 64 filters, 28x28) on 5-way 5-shot tasks with 15 query images
per class, SGD inside, one task at a time on one device. The last table takes every preset.
"""

import argparse
import functools
import itertools
from typing import Any

import common
import jax
import numpy as np
import optax
from flax import nnx

import jaxmaml
from jaxmaml import Exact, FirstOrder, nn
from jaxmaml.adjoints import Adjoint
from jaxmaml.batching import ChunkSize
from jaxmaml.data import datasets, pools
from jaxmaml.experiments import presets
from jaxmaml.experiments.candidates import Spec
from jaxmaml.experiments.experiment import build_candidate, build_experiment
from jaxmaml.types import LossFn, MetaLearner, Params, Task

SIDES: dict[str, Adjoint] = {
    "first order": FirstOrder(),
    "exact": Exact(),
    "checkpoint": Exact(mode="checkpoint"),
    "reverse": Exact(mode="reverse"),
}
NUM_INNER_STEPS = (1, 2, 5, 10, 20, 50)
MOST_REVERSE_STEPS = 20
"""With more inner steps, plain reverse over reverse takes gigabytes."""
JUDGED_STEPS = 20
NOTEWORTHY = 1.5
"""A preset whose exact gradient takes more than this times first order's memory states a reason."""
SMALL_QUERY = "query no larger than support, whose values and tangents an exact step holds at once"
SMALL_NETWORK = (
    "parameters outweigh activations: each task holds its own, a cotangent and a product"
)

PRESET_COLUMNS = [
    *("preset", "inner steps", "tasks", "chunk size", "first", "exact", "exact / first"),
    *("first, all tasks", "exact, all tasks", "exact / first, all tasks", "reason"),
]


def main() -> None:
    """Measures, prints and appends the rows of the chosen tables, which takes minutes."""
    parser = common.parser(__doc__)
    parser.add_argument("--table", nargs="+", choices=["steps", "presets"], default=None)
    options = parser.parse_args()
    tables = options.table or ["steps", "presets"]
    if "steps" in tables:
        _steps_table(options)
    if "presets" in tables:
        _presets_table(options)


def temp_bytes(learner: MetaLearner, params: Params, tasks: Task, chunk_size: ChunkSize) -> int:
    """Returns the temporary bytes of the compiled meta-gradient; shapes will do."""

    def run(params: Params, tasks: Task) -> Any:
        return jaxmaml.meta_grad(learner, params, tasks, chunk_size=chunk_size)[:2]

    return common.compiled(run, params, tasks).temp_bytes


def measure_steps(
    num_inner_steps: tuple[int, ...], loss_fn: LossFn, params: Params
) -> list[dict[str, Any]]:
    """Returns a row per number of inner steps: the MiB of every side, and the growth of ours.

    Args:
        num_inner_steps: numbers of inner steps, in increasing order.
        loss_fn, params: the network.
    """
    # The bytes of every side.
    tasks = common.image_tasks(2, 5, 5, 15)
    unit = common.num_bytes(params)
    rows = []
    for number in num_inner_steps:
        found = {}
        for name, adjoint in SIDES.items():
            if name == "reverse" and number > MOST_REVERSE_STEPS:
                continue
            learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), number, adjoint=adjoint)
            found[name] = temp_bytes(learner, params, tasks, 1)
        rows.append({"inner steps": number, "params_bytes": unit, "temp_bytes": found})

    # The growth per inner step, in parameters.
    for before, after in itertools.pairwise(rows):
        num_added = after["inner steps"] - before["inner steps"]
        growth = common.growth_per_step(before["temp_bytes"], after["temp_bytes"], num_added, unit)
        after["growth"] = growth["exact"]
    return [row | {name: b / common.MIB for name, b in row["temp_bytes"].items()} for row in rows]


def verdicts(rows: list[dict[str, Any]], judged: int) -> list[dict[str, Any]]:
    """Returns a row per figure that must be reached.

    Args:
        rows: those of `measure_steps`.
        judged: the number of inner steps that is judged.
    """
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


def measure_preset(preset: presets.Preset) -> dict[str, Any]:
    """Returns a row: MiB of first order and exact, at the preset's chunk size and with all tasks."""
    experiment = build_experiment(preset, seed=0, num_test_tasks=1, images=_blank_images(preset))
    tasks = jax.eval_shape(experiment.sources["train"], experiment.train_key)
    params = experiment.network.params
    row: dict[str, Any] = {
        "inner steps": preset.num_inner_steps, "tasks": preset.num_tasks,
        "chunk size": preset.chunk_size,
    }  # fmt: skip
    sizes: dict[str, ChunkSize] = {"": preset.core_chunk_size, ", all tasks": None}
    for label, size in sizes.items():
        for order in ("first", "exact"):
            learner = build_candidate(experiment, Spec(order, order, preset.inner_lr)).learner
            row[f"{order}{label}"] = temp_bytes(learner, params, tasks, size) / common.MIB
        row[f"exact / first{label}"] = row[f"exact{label}"] / row[f"first{label}"]
    above = max(row["exact / first"], row["exact / first, all tasks"]) > NOTEWORTHY
    return {**row, "reason": _reason(row, params) if above else None}


def _blank_images(preset: presets.Preset) -> dict[str, pools.Pool]:
    """Returns as many blank images as a task needs, in place of the dataset."""
    per_class = preset.shot + max(preset.query, preset.test_query)
    labels = np.repeat(np.arange(preset.way), per_class)
    shape = _image_shape(preset)
    images = np.zeros((len(labels), *shape), np.uint8)
    pool = pools.from_arrays(images, labels, [str(i) for i in range(preset.way)])
    return dict.fromkeys(("train", "val", "test"), pool)


def _image_shape(preset: presets.Preset) -> tuple[int, int, int]:
    if preset.is_regression:
        return 28, 28, 1
    if preset.dataset in datasets.DATASETS:
        return datasets.DATASETS[preset.dataset].format.shape
    return preset.image_size, preset.image_size, 3  # pictures in a folder


def _reason(row: dict[str, Any], params: Params) -> str:
    """Returns why exact takes much more memory than first order.

    With all tasks at once, first order holds the parameters of each task once. They are a large
    share of its memory if activations are small.
    """
    per_task = common.num_bytes(params) * row["tasks"] / common.MIB
    return SMALL_NETWORK if per_task > row["first, all tasks"] / 2 else SMALL_QUERY


def _small_network() -> tuple[LossFn, Params]:
    """Returns (loss_fn, params) of a network that compiles at once."""
    apply_fn, params = nn.from_nnx(nn.MLP(28 * 28, 5, hidden=(8,), rngs=nnx.Rngs(0)))
    return nn.cross_entropy(apply_fn), params


def _steps_table(options: argparse.Namespace) -> None:
    numbers = (1, 2) if options.quick else NUM_INNER_STEPS
    network = _small_network if options.quick else functools.partial(common.conv4, 5, pooled=True)
    measure = lambda: measure_steps(numbers, *network())
    rows = common.Rows(options, benchmark="memory", table="steps").of({}, measure)
    judge = lambda: verdicts(rows, numbers[-1] if options.quick else JUDGED_STEPS)
    judged = common.Rows(options, benchmark="memory", table="must").of({}, judge)
    name = "A small MLP" if options.quick else "Conv4 pooled"
    print(f"{name}, 5w5s, 15 query, one task at a time: MiB\n")
    common.print_table(rows, ["inner steps", *SIDES, "growth"])
    print()
    common.print_table(judged, ["figure", "value", "must", "reached"])


def _presets_table(options: argparse.Namespace) -> None:
    names = ["sinusoid-5shot"] if options.quick else list(presets.PRESETS)
    rows, table = [], common.Rows(options, benchmark="memory", table="presets")
    for name in names:
        rows += table.of({"preset": name}, functools.partial(measure_preset, presets.get(name)))
        print(f"{name} done", flush=True)
    print("\nPresets: MiB\n")
    common.print_table(rows, PRESET_COLUMNS)


if __name__ == "__main__":
    main()
