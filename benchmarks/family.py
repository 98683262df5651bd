"""Every learner on one preset: equal outer steps and seeds, each at its own best inner rate.

    python benchmarks/family.py glyphs-5w1s --out family.jsonl

Each learner is trained with the first seed at every rate of its grid, for a fifth of the steps. The
rate with the best validation score is its own, at which all seeds are trained. A few learners have
settings of their own (`SUITED`). There is one row per run, then one per learner: the mean over seeds
of the test score, with the 95 % interval over the tasks of all seeds, and of the nearest neighbor on
the learned features before adaptation ("on_features"). Without tensorflow-datasets, `--data` names the
.npz that `reproduce.py export` wrote.
"""

import argparse
from typing import Any

import common
import numpy as np
import runs

from jaxmaml.experiments import learners, presets
from jaxmaml.experiments.candidates import Spec
from jaxmaml.experiments.experiment import build_candidate
from jaxmaml.experiments.presets import Preset

COLUMNS = [
    *("learner", "inner_lr", "headline_step", "headline", "ci95", "per_seed", "on_features"),
    *("steps_done", "ms_per_outer_step", "mib", "gflop"),
]
GRIDS = {"cavia": (100.0, 300.0, 1000.0), "reptile": (0.4, 1.0, 2.0)}
"""The inner rates of learners that need others than `GRID`.

CAVIA's rate belongs to its context. The gradient of the context is proportional to the head, so that
the best rate goes with the inverse square of the head's scale.
"""
GRID = (0.1, 0.4, 1.0)
SUITED: dict[str, dict[str, Any]] = {
    # These learn the head from little, or through a gradient that has passed it.
    "anil": {"head_scale": 0.01},
    "cavia": {"head_scale": 0.01},
    # The head is not adapted: what it starts from routes the gradients of the body.
    "boil": {"head_scale": 0.1},
    # Training adapts to support and query together; its paper takes 10 to 15 images of a class.
    "reptile": {"query": 5},
}
"""The settings of learners that differ from those of the preset."""


def main() -> None:
    """Trains, tests, prints and appends the rows."""
    options = _options()
    common.use_all_cores()
    preset = presets.override(
        presets.get(options.preset), num_outer_steps=options.num_outer_steps,
        num_tasks=options.num_tasks, num_validations=1,
    )  # fmt: skip
    if options.quick:
        changes = {"num_outer_steps": 5, "num_filters": 4, "num_val_tasks": 5}
        preset = presets.override(preset, **changes)
    rows, table = [], common.Rows(options, table="learner")
    for name in options.learners:
        # The rows of its runs hold what this one is made of.
        case = {
            "preset": preset.name, "learner": name, "num_outer_steps": preset.num_outer_steps,
            "num_tasks": preset.num_tasks, "num_seeds": options.num_seeds,
            "num_test_tasks": runs.num_test_tasks(options), "inner_lrs": _rates(name, options),
        }  # fmt: skip
        rows += table.of(case, lambda name=name: _measure(preset, name, options))
        common.print_table(rows[-1:], COLUMNS)
    print()
    common.print_table(rows, COLUMNS)


def _measure(preset: Preset, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the row of one learner."""
    # The best rate, from short runs of the first seed.
    preset = presets.override(preset, **SUITED.get(name, {}))
    entry = learners.LEARNERS[learners.resolve(name)[0]]
    rates = _rates(name, options)
    if entry.fills_head:
        rates = [preset.inner_lr]
    best, grid = rates[0], {}
    if len(rates) > 1:
        short = presets.override(preset, num_outer_steps=max(1, preset.num_outer_steps // 5))
        grid = {rate: _run(short, name, rate, 0, options)["validation"] for rate in rates}
        best = max(rates, key=lambda rate: _or_worst(grid[rate]))

    # Means over seeds; costs are those of the first one.
    found = [_run(preset, name, best, seed, options) for seed in range(options.num_seeds)]
    values = [run["headline"] for run in found]
    cost, on_features = found[0], [run["on_features"] for run in found]
    return {
        "inner_lr": best, "validation_by_rate": grid, "settings": SUITED.get(name, {}),
        "headline_step": cost["headline_step"], "headline": float(np.mean(values)),
        "ci95": float(runs.ci95_over_seeds([run["ci95"] for run in found])),
        "on_features": None if None in on_features else float(np.mean(on_features)),
        "per_seed": [round(value, 4) for value in values], "steps_done": cost["steps_done"],
        "ms_per_outer_step": cost["ms_per_outer_step"], "mib": cost["mib"], "gflop": cost["gflop"],
    }  # fmt: skip


def _run(
    preset: Preset, name: str, rate: float, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Returns the row of one run, and appends it."""
    learner, order = learners.resolve(name)

    def measure() -> dict[str, Any]:
        with_classes = learners.needs_class_numbers(preset, learner)
        experiment = runs.build(preset, seed, options, with_classes=with_classes)
        candidate = build_candidate(experiment, Spec(name, order, rate, learner))
        return runs.row(runs.train(experiment, candidate, options))

    case = {
        "preset": preset.name, "learner": name, "inner_lr": rate, "seed": seed,
        "num_outer_steps": preset.num_outer_steps, "num_tasks": preset.num_tasks,
        "num_test_tasks": runs.num_test_tasks(options),
    }  # fmt: skip
    return common.Rows(options, table="run").of(case, measure)[0]


def _rates(name: str, options: argparse.Namespace) -> list[float]:
    """Returns the inner rates that are tried for a learner that has one."""
    return list(options.inner_lrs or GRIDS.get(name, GRID))


def _or_worst(value: float | None) -> float:
    """Returns a score below every accuracy if training diverged: such a rate is never the best."""
    return -1.0 if value is None or not np.isfinite(value) else value


def _options() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument(
        "preset", choices=[n for n, p in presets.PRESETS.items() if p.domain == "classification"]
    )
    names = [*learners.of_domain("classification"), *learners.ALIASES]
    parser.add_argument("--learners", nargs="+", choices=names, default=names)
    parser.add_argument("--inner-lrs", nargs="+", type=float, help="the grid of all learners")
    parser.add_argument("--num-tasks", type=int, help="tasks per outer step")
    parser.add_argument("--num-seeds", type=int, default=3)
    runs.add_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
