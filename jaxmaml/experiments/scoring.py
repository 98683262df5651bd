"""Scores of a candidate on fixed tasks, which are never all held at once."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmaml import metrics, parallel
from jaxmaml.experiments.candidates import Candidate
from jaxmaml.train.averaging import scored_params
from jaxmaml.types import (
    Array,
    MetaLearner,
    MetaParams,
    MetaState,
    State,
    Task,
    as_stateful,
    carries_state,
)


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
    # The tasks may need another mesh than the one of training.
    params, state = jax.device_get((scored_params(meta_state), meta_state.state))
    values = [
        _values(
            params, state, batch, learner=candidate.learner,
            metric_fn=candidate.model.metric_fn,
            num_inner_steps=candidate.num_test_inner_steps, chunk_size=candidate.chunk_size,
        )
        for batch in tasks
    ]  # fmt: skip
    summary = metrics.mean_and_ci95(np.concatenate(values)[:num_tasks])
    return Score(*summary, candidate.headline_step)


# One program scores a candidate on both splits: its learner and its metric are the same objects.
@functools.partial(
    jax.jit, static_argnames=("learner", "metric_fn", "num_inner_steps", "chunk_size")
)
def _values(
    params: MetaParams,
    state: State,
    tasks: Task,
    *,
    learner: MetaLearner,
    metric_fn: Any,
    num_inner_steps: int,
    chunk_size: Any,
) -> Array:
    """Returns the metric of each task after 0..n inner steps, `[num_tasks, n + 1]`."""
    metric = lambda adapted, query, *state: as_stateful(metric_fn)(adapted, query, state)[0]
    if carries_state(metric_fn):
        metric = lambda adapted, query, state: metric_fn(adapted, query, state)[0]
    return parallel.evaluate(
        learner, metric, params, tasks,
        mesh=parallel.task_mesh(len(jax.tree.leaves(tasks)[0])), state=state,
        num_inner_steps=num_inner_steps, chunk_size=chunk_size,
    )  # fmt: skip
