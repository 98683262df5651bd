"""Scores to compare those of a test with: the nearest neighbor, or the best possible return."""

from typing import NamedTuple

from jaxmaml.experiments import agents
from jaxmaml.experiments.domains import Domain
from jaxmaml.experiments.experiment import Experiment, scored_tasks
from jaxmaml.experiments.probes import nearest_neighbor_on_pixels


class Reference(NamedTuple):
    """A score that no training reaches by itself, or that none can exceed.

    Attributes:
        name: what reaches it.
        short: the same, for a narrow column.
        sentence: the same, as the beginning of a sentence.
        value: the score.
    """

    name: str
    short: str
    sentence: str
    value: float


KEYS: dict[str, str] = {"classification": "nearest_neighbour", "reinforcement": "optimal_return"}
"""The name of the reference in results.json, for the domains that have one."""
_NAMES = {
    "classification": (
        "nearest neighbor, pixels", "NN, pixels", "Nearest neighbor on pixels, without training",
    ),
    "reinforcement": (
        "best possible", "best possible", "Best expected return of a policy that knows the task",
    ),
}  # fmt: skip


def measure(experiment: Experiment, num_tasks: int) -> Reference | None:
    """Returns the reference of the test tasks; None if there is none.

    Args:
        experiment: what all runs share.
        num_tasks: the number of tasks that count.
    """
    preset = experiment.preset
    if preset.domain == "regression":
        return None
    tasks = scored_tasks(experiment, "test", num_tasks)
    if preset.domain == "classification":
        return named(preset.domain, nearest_neighbor_on_pixels(tasks, num_tasks))
    return named(preset.domain, agents.optimal_return(preset, tasks, num_tasks))


def named(domain: Domain, value: float | None) -> Reference | None:
    """Returns the reference of a value in results.json; None for none.

    >>> named("reinforcement", -0.7).name
    'best possible'
    """
    return None if value is None else Reference(*_NAMES[domain], value)
