"""Ablations of the recipe for Omniglot 5-way 1-shot: short trainings of equal arithmetic.

    python benchmarks/ablations.py --data-dir DIR --out ablations.jsonl

Every variant is trained with the same number of floating-point operations, so that a variant whose
outer step costs more makes fewer of them (`--num-outer-steps` sets their number instead). A variant
differs from the one that its row names in the settings of the row only. There is one row per variant:
accuracy in % on test tasks after each inner step, with the last parameters (their average, where the
variant has one). Without tensorflow-datasets, `--data` names the .npz that `reproduce.py export` wrote.
"""

import argparse
from typing import Any, NamedTuple

import common
import runs

from jaxmaml.experiments import learners, presets
from jaxmaml.experiments.candidates import Candidate, Spec
from jaxmaml.experiments.experiment import Experiment, build_candidate, init_state, step_tasks
from jaxmaml.experiments.presets import Preset
from jaxmaml.experiments.probes import flops_per_outer_step

COLUMNS = [
    *("variant", "of", "accuracy", "ci95", "best_step", "num_outer_steps", "gflop"),
    *("ms_per_outer_step", "mib"),
]


class Variant(NamedTuple):
    """A variant of a recipe.

    Attributes:
        of: the variant from which it differs; "" for the preset of the paper.
        changes: the settings that differ.
        learner: the learner, where it differs.
    """

    of: str
    changes: dict[str, Any]
    learner: str | None = None


_BASE = {"inner_lr": 0.4, "head_scale": 0.01, "adapt_norm": True, "norm_scale": True}
_MULTI_STEP = {"num_inner_steps": 3, "num_test_inner_steps": 3}

VARIANTS: dict[str, Variant] = {
    "paper": Variant("", {}),
    "base": Variant("paper", _BASE),
    "no rotation in training": Variant("base", {"rotate_train": False}),
    "no average": Variant("base", {"averaging": 0.0}),
    "outer rate 3e-3": Variant("base", {"outer_lr": 3e-3}),
    "cosine from 3e-3": Variant("base", {"outer_lr": 3e-3, "outer_schedule": "cosine"}),
    "5 query images": Variant("base", {"query": 5}),
    "8 tasks": Variant("base", {"num_tasks": 8}),
    "64 tasks": Variant("base", {"num_tasks": 64}),
    "pooling": Variant("base", {"pooled": True}),
    "rates per parameter": Variant("base", {}, "meta_sgd"),
    "rates per layer": Variant("base", {}, "maml_plus_plus"),
    "3 inner steps": Variant("base", _MULTI_STEP),
    "3 inner steps, rates per layer, multi-step loss": Variant(
        "base", _MULTI_STEP, "maml_plus_plus"
    ),
    "head of class means": Variant("base", {}, "proto_maml"),
}
"""The variants, by name."""


def main() -> None:
    """Trains, tests, prints and appends a row per variant."""
    options = _options()
    common.use_all_cores()
    rows, table = [], common.Rows(options, table="ablation")
    for name in options.variants:
        case = {
            "preset": options.preset,
            "variant": name,
            "tflop": options.tflop,
            "seed": options.seed,
            "num_outer_steps": options.num_outer_steps,
            "num_test_tasks": runs.num_test_tasks(options),
        }
        rows += table.of(case, lambda name=name: _measure(name, options))
        common.print_table(rows[-1:], COLUMNS)
    print()
    common.print_table(rows, COLUMNS)


def resolved(name: str) -> tuple[str, dict[str, Any]]:
    """Returns the learner of a variant, and how its settings differ from the preset's.

    >>> resolved("outer rate 3e-3")[1]["inner_lr"]
    0.4
    """
    variant = VARIANTS[name]
    learner, changes = resolved(variant.of) if variant.of else (learners.DEFAULT, {})
    return variant.learner or learner, changes | variant.changes


def _measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the row of one variant."""
    # As many steps as the arithmetic allows.
    learner, changes = resolved(name)
    changes = changes | {"num_validations": 1}
    if options.quick:
        changes |= {"num_outer_steps": 4, "num_filters": 4, "num_val_tasks": 5}
    preset = presets.override(presets.get(options.preset), **changes)
    flops = _flops(*_built(preset, learner, options))
    num_steps = options.num_outer_steps or max(1, round(options.tflop * 1e12 / flops))
    if not options.quick:
        preset = presets.override(preset, num_outer_steps=num_steps)

    # Train and test.
    row = runs.row(runs.train(*_built(preset, learner, options), options))
    means = row["mean_per_step"]
    best = max(range(len(means)), key=lambda i: means[i])
    return {
        "of": VARIANTS[name].of, "learner": learner, "changes": changes,
        "num_outer_steps": row["steps_done"], "accuracy": 100 * means[best],
        "ci95": 100 * row["ci95_per_step"][best], "best_step": best,
        "mean_per_step": means, "validation": row["validation"], "stopped": row["stopped"],
        "gflop": row["gflop"], "ms_per_outer_step": row["ms_per_outer_step"], "mib": row["mib"],
    }  # fmt: skip


def _built(
    preset: Preset, learner: str, options: argparse.Namespace
) -> tuple[Experiment, Candidate]:
    """Returns the experiment of a preset and the candidate of its learner."""
    experiment = runs.build(preset, options.seed, options)
    return experiment, build_candidate(experiment, Spec(learner, "exact", preset.inner_lr, learner))


def _flops(experiment: Experiment, candidate: Candidate) -> int:
    """Returns the floating-point operations of one outer step."""
    return flops_per_outer_step(
        candidate.learner, experiment.optimizer, init_state(experiment, candidate),
        step_tasks(experiment, 0), candidate.chunk_size,
    )  # fmt: skip


def _options() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--preset", default="omniglot-5w1s")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument(
        "--tflop", type=float, default=30.0, help="operations of each training, in 1e12"
    )
    parser.add_argument("--seed", type=int, default=0)
    runs.add_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
