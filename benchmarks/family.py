"""Every learner on one preset: equal outer steps and seeds, each at its own best inner rate.

    python benchmarks/family.py glyphs-5w1s --out family.jsonl

Each learner is trained with the first seed at every rate of the grid. The rate with the best
validation score is its own, and the other seeds are trained at that rate. Learners without a rate are
trained once per seed. There is one row per run, then one per learner: the mean over seeds of the test
score, with the 95 % interval over the tasks of all seeds, and of the nearest neighbor on the learned
features before adaptation ("on_features"). Without tensorflow-datasets, `--data` names the .npz that
`reproduce.py export` wrote.
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


def main() -> None:
    """Trains, tests, prints and appends the rows."""
    options = _options()
    common.use_all_cores()
    changes = {"num_outer_steps": options.num_outer_steps, "num_validations": 1}
    if options.quick:
        changes |= {"num_outer_steps": 4, "num_filters": 4, "num_val_tasks": 5}
    preset = presets.override(presets.get(options.preset), **changes)
    rows, table = [], common.Rows(options, table="learner")
    for name in options.learners:
        # The rows of its runs hold what this one is made of.
        case = {"preset": preset.name, "learner": name, "num_outer_steps": preset.num_outer_steps}
        rows += table.of(case, lambda name=name: _measure(preset, name, options))
        common.print_table(rows[-1:], COLUMNS)
    print()
    common.print_table(rows, COLUMNS)


def _measure(preset: Preset, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the row of one learner."""
    # The first seed at every rate, the other seeds at the best rate.
    entry = learners.LEARNERS[learners.resolve(name)[0]]
    rates = [preset.inner_lr] if entry.fills_head else options.inner_lrs
    first = {rate: _run(preset, name, rate, 0, options) for rate in rates}
    best = max(rates, key=lambda rate: _or_worst(first[rate]["validation"]))
    others = [_run(preset, name, best, seed, options) for seed in range(1, options.num_seeds)]

    # Means over seeds; costs are those of the first one.
    found = [first[best], *others]
    values = [run["headline"] for run in found]
    cost, on_features = found[0], [run["on_features"] for run in found]
    return {
        "inner_lr": best, "rates": rates,
        "headline_step": cost["headline_step"], "headline": float(np.mean(values)),
        "ci95": float(np.sqrt(np.sum(np.square([run["ci95"] for run in found]))) / len(found)),
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
        "num_outer_steps": preset.num_outer_steps,
    }  # fmt: skip
    return common.Rows(options, table="run").of(case, measure)[0]


def _or_worst(value: float | None) -> float:
    """Returns a score below every accuracy if training diverged: such a rate is never the best."""
    return -1.0 if value is None or not np.isfinite(value) else value


def _options() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("preset", choices=[n for n, p in presets.PRESETS.items() if p.way > 1])
    names = [*learners.LEARNERS, *learners.ALIASES]
    parser.add_argument("--learners", nargs="+", choices=names, default=names)
    parser.add_argument("--inner-lrs", nargs="+", type=float, default=[0.1, 0.4, 1.0])
    parser.add_argument("--num-seeds", type=int, default=3)
    runs.add_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
