"""Runs of presets in benchmarks: their options, their images, and the row of a trained candidate.

`export` writes the images of a dataset to one file, which `load_images` reads on a machine without
tensorflow-datasets.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import common
import jax
import numpy as np

from jaxmaml.checkpoint import Manager
from jaxmaml.data import pools
from jaxmaml.experiments.candidates import Candidate
from jaxmaml.experiments.experiment import Experiment, build_experiment
from jaxmaml.experiments.interruption import Interrupted, interruptible
from jaxmaml.experiments.presets import Preset
from jaxmaml.experiments.progress import Display
from jaxmaml.experiments.run import Probe, Run, train_and_test
from jaxmaml.experiments.settings import DOCUMENTATION
from jaxmaml.experiments.tasks import SPLITS
from jaxmaml.files import json_digest

QUICK_TEST_TASKS = 20

Show: TypeAlias = Callable[[list[dict[str, Any]]], None]
"""Shows rows of metrics."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of every benchmark that trains and tests presets."""
    parser.add_argument("--num-outer-steps", type=int, help="defaults to the preset's")
    parser.add_argument("--num-test-tasks", type=int, default=600)
    parser.add_argument("--data-dir", type=Path, help="prepared TFDS directory")
    parser.add_argument(
        "--checkpoints", type=Path, metavar="DIR",
        help="directory in which trainings are saved, and from which they go on",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=Path, help=".npz that reproduce.py export wrote, in place of --data-dir"
    )


def num_test_tasks(options: argparse.Namespace) -> int:
    """Returns the number of test tasks of a command line."""
    return QUICK_TEST_TASKS if options.quick else options.num_test_tasks


def build(
    preset: Preset, seed: int, options: argparse.Namespace, *, with_classes: bool = False
) -> Experiment:
    """Returns the experiment of a preset, with the images that the command line names.

    Args:
        preset: the settings.
        seed: the seed of the initial parameters and of the training episodes.
        options: a command line with the options of `add_options`.
        with_classes: see `build_experiment`.
    """
    images = None if options.data is None else load_images(options.data)
    return build_experiment(
        preset, seed=seed, num_test_tasks=num_test_tasks(options), data_dir=options.data_dir,
        images=images, with_classes=with_classes,
    )  # fmt: skip


def export(preset: Preset, data_dir: Path | None, path: Path) -> None:
    """Writes the images and labels of every split of a preset's dataset to one .npz."""
    from jaxmaml.data import datasets

    where = (preset.dataset, data_dir, preset.split or None, preset.image_size or None)
    arrays: dict[str, Any] = {}
    for split, pool in datasets.load(*where).items():
        labels = np.repeat(np.arange(len(pool.names)), np.asarray(pool.sizes))
        arrays |= {
            f"{split}_images": np.asarray(pool.images), f"{split}_labels": labels,
            f"{split}_names": np.array(pool.names),
        }  # fmt: skip
    np.savez_compressed(path, **arrays)


def load_images(path: Path) -> dict[str, pools.Pool]:
    """Returns the images of each split from a file of `export`."""
    arrays = np.load(path)
    return {
        split: pools.from_arrays(
            arrays[f"{split}_images"], arrays[f"{split}_labels"], arrays[f"{split}_names"].tolist()
        )
        for split in SPLITS
    }


class _Unwritten:
    """A record of metrics that a function shows and that no file keeps."""

    is_written = True

    def __init__(self, show: Show):
        self.show = show

    def __call__(self, rows: list[dict[str, Any]], /) -> None:
        self.show(rows)

    def cut(self, label: str, num_steps: int, validations: list[int]) -> None:
        """Removes nothing: a run without checkpoints starts from its beginning."""

    def finish(self) -> None:
        """Has nothing to write."""


def train(
    experiment: Experiment,
    candidate: Candidate,
    options: argparse.Namespace,
    *,
    show: Show = lambda rows: None,
    probe: Probe | None = None,
) -> Run:
    """Trains a candidate with validation, and tests it.

    SIGINT and SIGTERM end the process with 130 and 143. With --checkpoints the training is saved then.

    Args:
        experiment: what all runs share.
        candidate: what is trained.
        options: a command line with the options of `add_options`.
        show: receives the metrics of every dispatch and validation.
        probe: called with the state about a dozen times along the run.
    """
    try:
        with interruptible(), Display() as display:
            return train_and_test(
                experiment, candidate,
                num_test_tasks=num_test_tasks(options), record=_Unwritten(show), display=display,
                probe=probe, checkpoints=_checkpoints(experiment, candidate, options),
            )  # fmt: skip
    except Interrupted as stop:
        print("interrupted", file=sys.stderr)
        sys.exit(stop.code)


def _checkpoints(
    experiment: Experiment, candidate: Candidate, options: argparse.Namespace
) -> Manager | None:
    """Returns the checkpoints of a run, in a directory of its own; None without --checkpoints."""
    if options.checkpoints is None:
        return None
    settings = dataclasses.asdict(experiment.preset).items()
    config = {
        "preset": {name: value for name, value in settings if name not in DOCUMENTATION},
        "spec": candidate.spec._asdict(),
        # A row says all of these of its training.
        "matmul_precision": jax.config.jax_default_matmul_precision,  # pyright: ignore
        **{name: value for name, value in common.environment().items() if name != "command"},
        "key": jax.random.key_data(experiment.train_key).tolist(),
    }  # fmt: skip
    name = f"{experiment.preset.name}-{candidate.label}-{json_digest(config)[:12]}"
    return Manager(options.checkpoints / name, config=config)


def row(run: Run) -> dict[str, Any]:
    """Returns the scores of a run at the quoted step and after every step, and its costs.

    "validation" is the last score on validation tasks, or None without validation or if training
    stopped early.
    """
    at = run.test.headline
    validation = float(run.curve[-1][1].mean[at]) if run.curve and not run.stopped else None
    return {
        "steps_done": run.num_outer_steps, "stopped": run.stopped,
        "validation": validation, "headline_step": at,
        "headline": float(run.test.mean[at]), "ci95": float(run.test.ci95[at]),
        **scores(run), "on_features": run.on_features,
        "ms_per_outer_step": 1e3 * run.seconds_per_outer_step,
        "mib": (run.temp_bytes or 0) / common.MIB, "gflop": run.flops / 1e9,
    }  # fmt: skip


def ci95_over_seeds(intervals: list[Any]) -> Any:
    """Returns a 95 % interval of a mean over seeds, from the intervals over the tasks of each seed.

    All seeds are tested on the same tasks, so that their errors may go together: the interval is no
    smaller than theirs. It does not say how trainings with other seeds differ.
    """
    return np.mean(intervals, axis=0)


def scores(run: Run) -> dict[str, Any]:
    """Returns the test scores after every inner step."""
    test = run.test
    return {
        "mean_per_step": test.mean.tolist(), "ci95_per_step": test.ci95.tolist(),
        "num_nonfinite": test.num_nonfinite,
    }  # fmt: skip
