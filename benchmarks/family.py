"""Every learner on one preset: equal outer steps and seeds, each at its own best inner rate.

    python benchmarks/family.py glyphs-5w1s --out family.jsonl

Each learner is trained with the first seed at every rate of the grid; the rate with the best
validation score is its own, and the other seeds are trained at that one. Learners without a rate are
trained once a seed. A row a run, and at the end one a learner: the mean over seeds of the test score,
with the 95 % interval over the tasks of all seeds, and of nearest neighbour on the features that it
learned, unadapted ("on_features"). Without tensorflow-datasets, `--data` names the .npz that
`reproduce.py export` writes.
"""

import argparse
from pathlib import Path
from typing import Any

import common
import numpy as np
import reproduce
from jaxmaml.train import experiment, family, presets
from jaxmaml.train.experiment import Spec

WITHOUT_RATE = family.HEAD_FILLING
COLUMNS = [
    *("learner", "inner_lr", "headline_step", "headline", "ci95", "per_seed", "on_features"),
    *("num_outer_steps", "ms_per_outer_step", "mib", "gflop"),
]


def main() -> None:
    """Trains, tests, prints and appends the rows."""
    options = _options()
    common.use_all_cores()
    changes = {"num_outer_steps": options.num_outer_steps, "num_validations": 1}
    if options.quick:
        changes |= {"num_outer_steps": 4, "num_filters": 4, "num_val_tasks": 5}
    preset = presets.override(presets.get(options.preset), **changes)
    rows = []
    for name in options.learners:
        found = _measure(preset, name, options)
        rows.append(found)
        common.emit([{"table": "learner", "quick": options.quick, **found}], options.out)
        common.print_table([found], COLUMNS)
    print()
    common.print_table(rows, COLUMNS)


def _measure(preset: presets.Preset, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one learner."""
    rates = [preset.inner_lr] if name in WITHOUT_RATE else options.inner_lrs
    first = {rate: _run(preset, name, rate, 0, options) for rate in rates}
    best = max(rates, key=lambda rate: _or_worst(first[rate]["validation"]))
    more = [_run(preset, name, best, seed, options) for seed in range(1, options.num_seeds)]
    runs = [first[best], *more]
    values = [run["headline"] for run in runs]
    cost, on_features = runs[0], [run["on_features"] for run in runs]
    return {
        "preset": preset.name, "learner": name, "inner_lr": best, "rates": rates,
        "headline_step": cost["headline_step"], "headline": float(np.mean(values)),
        "ci95": float(np.sqrt(np.sum(np.square([run["ci95"] for run in runs]))) / len(runs)),
        "on_features": None if None in on_features else float(np.mean(on_features)),
        "per_seed": [round(value, 4) for value in values], "num_outer_steps": cost["num_outer_steps"],
        "ms_per_outer_step": cost["ms_per_outer_step"], "mib": cost["mib"], "gflop": cost["gflop"],
    }  # fmt: skip


def _run(
    preset: presets.Preset, name: str, rate: float, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    learner, order = family.resolve(name)
    classes = None if options.data is None else reproduce.load(options.data)
    num_test_tasks = 20 if options.quick else options.num_test_tasks
    built = experiment.build(
        preset, seed=seed, num_test_tasks=num_test_tasks, data_dir=options.data_dir, classes=classes,
        with_classes=family.needs_class_numbers(preset, learner),
    )  # fmt: skip
    spec = Spec(name, order, rate, learner)
    row = {
        "table": "run", "preset": preset.name, "learner": name, "inner_lr": rate, "seed": seed,
        **reproduce.train(built, spec, num_test_tasks),
    }  # fmt: skip
    common.emit([{"quick": options.quick, **row}], options.out)
    return row


def _or_worst(value: float | None) -> float:
    """A rate under which training diverges is no learner's best: below every accuracy."""
    return -1.0 if value is None or not np.isfinite(value) else value


def _options() -> argparse.Namespace:
    parser = common.parser((__doc__ or "").splitlines()[0])
    parser.add_argument("preset", choices=[n for n, p in presets.PRESETS.items() if p.way > 1])
    names = [*family.LEARNERS, *family.ALIASES]
    parser.add_argument("--learners", nargs="+", choices=names, default=names)
    parser.add_argument("--inner-lrs", nargs="+", type=float, default=[0.1, 0.4, 1.0])
    parser.add_argument("--num-seeds", type=int, default=3)
    parser.add_argument("--num-outer-steps", type=int, help="the preset's unless told")
    parser.add_argument("--num-test-tasks", type=int, default=600)
    parser.add_argument("--data-dir", type=Path, help="prepared TFDS directory")
    parser.add_argument("--data", type=Path, help=".npz of the images, in place of --data-dir")
    return parser.parse_args()


if __name__ == "__main__":
    main()
