"""Scores of a candidate on fixed tasks, which are never all held at once."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

import jaxmaml
from jaxmaml import metrics, parallel
from jaxmaml.averaging import averaged
from jaxmaml.batching import check_tasks
from jaxmaml.experiments.candidates import Candidate
from jaxmaml.types import MetaState, Task


class Score(NamedTuple):
    """A metric over tasks after 0..n inner steps.

    Attributes:
        mean: `[n + 1]`, NaN where the score of a task is not finite.
        ci95: half width of the 95 % confidence interval, `[n + 1]`.
        num_nonfinite: tasks with a score that is not finite.
        headline: the inner step whose score is quoted.
    """

    mean: np.ndarray
    ci95: np.ndarray
    num_nonfinite: int
    headline: int


def score(
    candidate: Candidate, meta_state: MetaState, tasks: Iterable[Task], num_tasks: int
) -> Score:
    """Returns the score of a candidate.

    Args:
        candidate: the learner and its metric.
        meta_state: the state of the run; its averaged parameters are scored if it has them.
        tasks: batches of tasks, see `experiment.scored_tasks`.
        num_tasks: the number of tasks that count.
    """
    # The number of tasks in a batch decides over how many devices they are spread.
    tasks = iter(tasks)
    first = next(tasks)
    values = jaxmaml.evaluate(
        candidate.learner, candidate.model.metric_fn, averaged(meta_state),
        itertools.chain([first], tasks), num_tasks=num_tasks,
        num_inner_steps=candidate.num_test_inner_steps, chunk_size=candidate.chunk_size,
        mesh=parallel.task_mesh(check_tasks(first)),
    )  # fmt: skip
    return Score(*metrics.mean_and_ci95(values), candidate.headline_step)
