"""A published number from a preset, on a machine that has no tensorflow-datasets and no network.

    python benchmarks/reproduce.py export omniglot-5w1s --data-dir DIR --data omniglot.npz
    python benchmarks/reproduce.py run omniglot-5w1s --data omniglot.npz --out results.jsonl

`export` needs what the package needs; `run` needs jax, flax and optax. Where everything is installed,
`jaxmaml train PRESET --data-dir DIR` does the same, with a progress bar and checkpoints.
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import common
import jax
import numpy as np
from jaxmaml.train import experiment, loop, presets, scoring, training

from jaxmaml.data import pools


def export(preset: presets.Preset, data_dir: Path | None, data: Path) -> None:
    """Writes the images and labels of every split to one .npz."""
    from jaxmaml.data import sources

    arrays: dict[str, Any] = {}
    for part, pool in sources.load(preset.dataset, data_dir, preset.split).items():
        labels = np.repeat(np.arange(len(pool.names)), np.asarray(pool.sizes))
        arrays |= {
            f"{part}_images": np.asarray(pool.images), f"{part}_labels": labels,
            f"{part}_names": np.array(pool.names),
        }  # fmt: skip
    np.savez_compressed(data, **arrays)


def load(data: Path) -> dict[str, pools.Pool]:
    """What `export` wrote."""
    arrays = np.load(data)
    return {
        part: pools.from_arrays(
            arrays[f"{part}_images"], arrays[f"{part}_labels"], arrays[f"{part}_names"].tolist()
        )
        for part in ("train", "val", "test")
    }


def run(
    preset: presets.Preset, data: Path | None, order: str, seed: int, num_test_tasks: int
) -> dict[str, Any]:
    """Trains and tests; one row."""
    classes = None if data is None else load(data)
    built = experiment.build(preset, seed=seed, num_test_tasks=num_test_tasks, classes=classes)
    spec = experiment.Spec(order, order, preset.inner_lr)
    program = loop.compile_steps(
        experiment.learner(built, spec), built.optimizer, experiment.init_state(built, spec),
        built.sources["train"],
        key=built.train_key, chunk_size=experiment.chunk_size(preset), mesh=built.mesh,
        num_steps_per_dispatch=loop.steps_per_dispatch(preset.num_outer_steps),
    )  # fmt: skip
    start, last = time.perf_counter(), (experiment.init_state(built, spec), {})
    for last in loop.run(program, last[0], preset.num_outer_steps):
        print(f"step {int(last[0].step)}: loss {last[1]['loss'].mean():.4f}", flush=True)
    seconds = time.perf_counter() - start
    test = scoring.score(built, spec, last[0], "test", num_test_tasks)
    return {
        "preset": preset.name, "order": order, "seed": seed, "expected": preset.expected,
        "num_outer_steps": int(last[0].step), "seconds": seconds, "stopped": "stopped_at" in last[1],
        "num_test_tasks": num_test_tasks, "mean_per_step": test.mean.tolist(),
        "ci95_per_step": test.ci95.tolist(), "num_nonfinite": test.num_nonfinite,
        "headline": float(test.mean[test.headline]),
    }  # fmt: skip


def train(
    built: experiment.Experiment, spec: experiment.Spec, num_test_tasks: int, probe: Any = None
) -> dict[str, Any]:
    """Trains with validation and tests; what every table of runs tells of one.

    Returns:
        Scores at the step that is quoted and after every step, costs; "validation" is the last score
        on validation tasks, None where there is none or training stopped early.
    """
    with training.new_progress() as progress:
        done = training.run(
            built, spec, experiment.learner(built, spec), num_test_tasks=num_test_tasks,
            record=lambda lines: None, progress=progress, probe=probe,
        )  # fmt: skip
    at = done.test.headline
    last = done.curve[-1][1].mean[at] if done.curve and not done.stopped else None
    return {
        "num_outer_steps": done.num_outer_steps, "stopped": done.stopped,
        "validation": None if last is None else float(last), "headline_step": at,
        "headline": float(done.test.mean[at]), "ci95": float(done.test.ci95[at]),
        "mean_per_step": done.test.mean.tolist(), "ci95_per_step": done.test.ci95.tolist(),
        "num_nonfinite": done.test.num_nonfinite, "on_features": done.on_features,
        "ms_per_outer_step": 1e3 * done.seconds_per_outer_step,
        "mib": (done.temp_bytes or 0) / 2**20, "gflop": done.flops / 1e9,
    }  # fmt: skip


def _options() -> argparse.Namespace:
    parser = common.parser(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("action", choices=["export", "run"])
    parser.add_argument("preset", choices=list(presets.PRESETS))
    parser.add_argument("--data", type=Path, help="the .npz to write or read")
    parser.add_argument("--data-dir", type=Path, help="prepared TFDS directory, to export")
    parser.add_argument("--order", choices=["exact", "first"], default="exact")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-outer-steps", type=int, help="the preset's unless told")
    parser.add_argument("--num-test-tasks", type=int, default=600)
    parser.add_argument("--matmul-precision", default="highest")
    return parser.parse_args()


def main() -> None:
    """Runs the action."""
    options = _options()
    preset = presets.get(options.preset)
    if options.action == "export":
        export(preset, options.data_dir, options.data)
        return
    steps = 10 if options.quick else options.num_outer_steps or preset.num_outer_steps
    preset = dataclasses.replace(preset, num_outer_steps=steps)
    jax.config.update("jax_default_matmul_precision", options.matmul_precision)
    num_test_tasks = 20 if options.quick else options.num_test_tasks
    row = run(preset, options.data, options.order, options.seed, num_test_tasks)
    row["matmul_precision"] = options.matmul_precision
    common.print_table(
        [row], ["preset", "order", "expected", "headline", "num_outer_steps", "seconds"]
    )
    common.emit([row], options.out)


if __name__ == "__main__":
    common.use_all_cores()
    main()
