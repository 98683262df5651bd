"""Scores: means over the tasks that count, of the parameters that are to be scored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tiny import REGRESSION
from jaxmaml.experiments import presets
from jaxmaml.experiments.candidates import Spec
from jaxmaml.experiments.experiment import (
    build_candidate,
    build_experiment,
    init_state,
    scored_tasks,
)
from jaxmaml.experiments.scoring import score


def _built(preset=REGRESSION, num_test_tasks=4, inner_lr=0.01):
    experiment = build_experiment(preset, seed=0, num_test_tasks=num_test_tasks)
    candidate = build_candidate(experiment, Spec("x", "exact", inner_lr))
    return experiment, candidate, init_state(experiment, candidate)


def test_a_score_is_the_mean_over_the_tasks_that_count():
    experiment, candidate, state = _built(num_test_tasks=250)
    found = score(candidate, state, scored_tasks(experiment, "test", 130), 130)
    tasks = jax.tree.map(
        lambda *leaves: jnp.concatenate(leaves)[:130], *scored_tasks(experiment, "test", 130)
    )
    values = []
    for i in range(130):
        task = jax.tree.map(lambda leaf: leaf[i], tasks)  # noqa: B023
        values.append(candidate.model.metric_fn(state.params, task.query))
    assert found.mean.shape == found.ci95.shape == (3,)
    assert found.mean[0] == pytest.approx(np.mean(values), rel=1e-5)
    assert found.ci95[0] == pytest.approx(1.96 * np.std(values, ddof=1) / np.sqrt(130), rel=1e-4)
    assert (found.num_nonfinite, found.headline) == (0, 2)


def test_adaptation_lowers_the_error():
    preset = presets.override(REGRESSION, shot=50)  # a few examples would be fitted too well
    experiment, candidate, state = _built(preset, num_test_tasks=50)
    found = score(candidate, state, scored_tasks(experiment, "test", 50), 50)
    assert found.mean[2] < found.mean[0]


def test_the_average_of_the_parameters_is_scored():
    experiment, candidate, state = _built(presets.override(REGRESSION, averaging=0.9))
    tasks = lambda: scored_tasks(experiment, "test", 4)
    reference = score(candidate, state, tasks(), 4)
    moved = state._replace(params=jax.tree.map(lambda leaf: leaf + 1.0, state.params))
    np.testing.assert_array_equal(score(candidate, moved, tasks(), 4).mean, reference.mean)


def test_tasks_that_are_not_finite_are_counted():
    experiment, candidate, state = _built(inner_lr=1e30)
    found = score(candidate, state, scored_tasks(experiment, "test", 4), 4)
    assert found.num_nonfinite == 4
    assert np.isfinite(found.mean[0])
    assert np.isnan(found.mean[2])


def test_one_program_scores_both_splits():
    experiment, candidate, state = _built()
    calls = []

    def metric_fn(adapted, query):
        calls.append(query)
        return candidate.model.metric_fn(adapted, query)

    counted = candidate._replace(model=candidate.model._replace(metric_fn=metric_fn))
    score(counted, state, scored_tasks(experiment, "val", 4), 4)
    num_traces = len(calls)
    assert num_traces
    score(counted, state, scored_tasks(experiment, "test", 4), 4)
    assert len(calls) == num_traces
