"""Scoring the saved runs of a directory again."""

import pathlib
from typing import Any, NamedTuple

from rich.table import Table

from jaxmaml.train import checkpoint, report, results, scoring
from jaxmaml.train import experiment as experiments
from jaxmaml.train.averaging import scored_params
from jaxmaml.train.compare import checkpoint_path
from jaxmaml.train.experiment import Experiment, Spec
from jaxmaml.types import MetaState


class Restored(NamedTuple):
    """An experiment with the saved state of each of its runs."""

    experiment: Experiment
    states: dict[Spec, MetaState]


def restore(
    run_dir: pathlib.Path,
    config: dict[str, Any],
    data_dir: pathlib.Path | None,
    num_test_tasks: int,
) -> Restored:
    """Read back what `train` or `compare` saved.

    Args:
        run_dir: where.
        config: its config.json.
        data_dir: None is the directory that the run used.
        num_test_tasks: how many tasks will be scored.

    Raises:
        ValueError: a checkpoint is missing or does not fit, or the data set is missing.
    """
    used = config["data_dir"] and pathlib.Path(config["data_dir"])
    built = experiments.build(
        results.preset_of(config),
        seed=config["seed"],
        data_dir=data_dir or used,
        num_test_tasks=num_test_tasks,
    )
    states = {}
    for spec in (Spec(**run) for run in config["runs"]):
        path = checkpoint_path(run_dir, spec.label)
        states[spec] = checkpoint.restore(path, experiments.init_state(built, spec))
    return Restored(built, states)


def table(restored: Restored, num_test_tasks: int) -> Table:
    """The scores of all runs after every inner step."""
    experiment = restored.experiment
    scores = {}
    for spec, state in restored.states.items():
        scores[spec.label] = scoring.score(
            experiment, scored_params(state), spec.inner_lr, "test", num_test_tasks
        )
    floor = scoring.floor(experiment, num_test_tasks)
    return report.scores_table(experiment.preset, scores, num_test_tasks, floor)
