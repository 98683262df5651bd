"""A published number from a preset, on a machine without tensorflow-datasets and without a network.

    python benchmarks/reproduce.py export omniglot-5w1s --data-dir DIR --data omniglot.npz
    python benchmarks/reproduce.py run omniglot-5w1s --data omniglot.npz --out results.jsonl

`export` needs everything that the package needs; `run` needs jax, flax and optax. With everything
installed, `jaxmaml train PRESET --data-dir DIR` does the same and writes checkpoints.
"""

import argparse
import dataclasses
from typing import Any

import common
import jax
import numpy as np
import runs

from jaxmaml.experiments import presets
from jaxmaml.experiments.candidates import Spec
from jaxmaml.experiments.experiment import build_candidate

COLUMNS = ["preset", "order", "expected", "headline", "steps_done", "seconds"]


def main() -> None:
    """Exports images, or trains, tests, prints and appends a row."""
    options = _options()
    preset = presets.get(options.preset)
    if options.action == "export":
        runs.export(preset, options.data_dir, options.data)
        return
    steps = 10 if options.quick else options.num_outer_steps or preset.num_outer_steps
    preset = dataclasses.replace(preset, num_outer_steps=steps)
    jax.config.update("jax_default_matmul_precision", options.matmul_precision)
    case = {
        "preset": preset.name, "order": options.order, "seed": options.seed,
        "num_outer_steps": steps, "matmul_precision": options.matmul_precision,
        "num_test_tasks": runs.num_test_tasks(options),
    }  # fmt: skip
    rows = common.Rows(options).of(case, lambda: run(preset, options))
    common.print_table(rows, COLUMNS)


def run(preset: presets.Preset, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the row of a preset that is trained and tested."""
    # Train and test.
    experiment = runs.build(preset, options.seed, options)
    spec = Spec(options.order, options.order, preset.inner_lr)
    candidate = build_candidate(experiment, spec)
    done = runs.train(experiment, candidate, options, show=_print_loss)

    # The row.
    return {
        "expected": preset.expected, "steps_done": done.num_outer_steps,
        "seconds": done.num_outer_steps * done.seconds_per_outer_step,
        "stopped": bool(done.stopped),
        **runs.scores(done),
        "headline": float(done.test.mean[done.test.headline]),
    }  # fmt: skip


def _print_loss(rows: list[dict[str, Any]]) -> None:
    """Prints the mean loss of a dispatch; rows of a validation have none."""
    losses = [row["loss"] for row in rows if "loss" in row]
    if losses:
        print(f"step {rows[-1]['step'] + 1}: loss {np.mean(losses):.4f}", flush=True)


def _options() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("action", choices=["export", "run"])
    parser.add_argument("preset", choices=list(presets.PRESETS))
    parser.add_argument("--order", choices=["exact", "first"], default="exact")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--matmul-precision", default="highest")
    runs.add_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    common.use_all_cores()
    main()
