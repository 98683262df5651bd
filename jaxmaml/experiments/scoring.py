"""Scores of a candidate on fixed tasks, which are never all held at once."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

import jaxmaml
from jaxmaml import metrics, parallel, sources
from jaxmaml.averaging import averaged
from jaxmaml.batching import check_tasks
from jaxmaml.experiments.candidates import Candidate
from jaxmaml.experiments.presets import Preset
from jaxmaml.types import Array, MetaState, PlainFn, Task


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
    candidate: Candidate,
    meta_state: MetaState,
    tasks: Iterable[Task],
    num_tasks: int,
    mesh: Mesh | None = None,
) -> Score:
    """Returns the score of a candidate.

    Args:
        candidate: the learner and its metric.
        meta_state: the state of the run; its averaged parameters are scored if it has them.
        tasks: batches of tasks, see `experiment.scored_tasks`: those of the share of this process.
        num_tasks: the number of tasks that count.
        mesh: the devices over which the tasks are spread; defaults to all.
    """
    mesh = mesh or parallel.make_mesh()
    values = _evaluate(
        candidate, candidate.model.metric_fn, averaged(meta_state), tasks, num_tasks, mesh
    )
    return Score(*metrics.mean_and_ci95(values), candidate.headline_step)


def scored_part(meta_state: MetaState) -> MetaState:
    """Returns a state with all that its score depends on, and without its optimizer."""
    return averaged(meta_state)._replace(opt_state=())


def score_of_mean(
    candidate: Candidate,
    meta_states: Sequence[MetaState],
    tasks: Iterable[Task],
    num_tasks: int,
    mesh: Mesh | None = None,
) -> Score:
    """Returns the score of the mean of the outputs of several states, each adapted to each task.

    For a classifier the outputs are its logits, as in the code of MAML++ (Antoniou et al. 2019, arXiv
    1810.09502), which averages those of the five states with the best validation scores.

    Args:
        candidate: the learner and its metric.
        meta_states: results of `scored_part`.
        tasks: batches of tasks, see `experiment.scored_tasks`: all of them, in every process.
        num_tasks: the number of tasks that count.
        mesh: the devices over which the tasks are spread; defaults to all.
    """
    mesh, values = mesh or parallel.make_mesh(), []
    for batch in tasks:
        number = check_tasks(batch)
        rows = sources.rows(number, parallel.share_of(mesh))
        own = jax.tree.map(lambda leaf: leaf[rows], batch)  # noqa: B023
        outputs: Any = sum(
            _evaluate(candidate, candidate.model.apply_fn, state, [own], number, mesh)
            for state in meta_states
        )
        mean = outputs / len(meta_states)
        score_fn = candidate.model.score_fn
        assert score_fn is not None  # `settings` refuses averaged predictions of policies
        values.append(_score_outputs(mean, batch, score_fn=score_fn))
    found = np.concatenate(values)[:num_tasks]
    return Score(*metrics.mean_and_ci95(found), candidate.headline_step)


def averaged_suffix(num_states: int) -> str:
    """Returns what the label of a run is followed by where predictions are averaged.

    >>> averaged_suffix(5)
    ', mean of 5'
    """
    return f", mean of {num_states}"


def score_text(preset: Preset, score: Score, step: int) -> str:
    """Returns the score after an inner step as text."""
    return value_text(preset, score.mean[step], score.ci95[step])


def value_text(preset: Preset, mean: float, half_width: float) -> str:
    """Returns a score with the half width of an interval as text."""
    return preset.metric.text(mean, half_width) if np.isfinite(mean) else "not finite"


def _evaluate(
    candidate: Candidate,
    fn: Any,
    meta_state: MetaState,
    tasks: Iterable[Task],
    num_tasks: int,
    mesh: Mesh,
) -> Any:
    """Returns `fn` of the adapted parameters and the query, `[num_tasks, n + 1, ...]`."""
    return jaxmaml.evaluate(
        candidate.learner, fn, meta_state, tasks, num_tasks=num_tasks,
        num_inner_steps=candidate.num_test_inner_steps, chunk_size=candidate.chunk_size, mesh=mesh,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames="score_fn")
def _score_outputs(outputs: Array, tasks: Task, *, score_fn: PlainFn) -> Array:
    """Returns the scores `[num_tasks, n + 1]` of outputs `[num_tasks, n + 1, num_examples, ...]`."""
    per_step = jax.vmap(score_fn, in_axes=(0, None))
    return jax.vmap(per_step)(outputs, tasks.query)
