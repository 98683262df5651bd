"""Metrics against values worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmaml
from jaxmaml import metrics

LOGITS = jnp.array([[2.0, 1.0], [0.0, 3.0], [5.0, 0.0]])


def test_accuracy():
    assert metrics.accuracy(LOGITS, jnp.array([0, 1, 1])) == pytest.approx(2 / 3)
    weights = jnp.array([1.0, 0.0, 1.0])
    assert metrics.accuracy(LOGITS, jnp.array([0, 0, 1]), weights) == pytest.approx(1 / 2)


def test_accuracy_of_a_dead_model_is_nan_and_padding_may_hold_anything():
    dead = LOGITS.at[1].set(jnp.nan)
    assert np.isnan(metrics.accuracy(dead, jnp.array([0, 0, 0])))
    assert np.isnan(metrics.accuracy(LOGITS.at[0, 0].set(jnp.inf), jnp.array([0, 0, 0])))
    assert metrics.accuracy(dead, jnp.array([0, 0, 0]), jnp.array([1.0, 0.0, 1.0])) == 1


def test_mean_and_ci95():
    mean, ci95, num_nonfinite = metrics.mean_and_ci95(np.array([[1.0, 2.0], [3.0, 2.0]]))
    np.testing.assert_allclose(mean, [2, 2])
    np.testing.assert_allclose(ci95, [1.96, 0])
    assert num_nonfinite == 0


def test_a_task_that_is_not_finite_is_counted_and_never_averaged_away():
    values = np.array([[1.0, 2.0], [np.nan, 2.0], [1.0, np.inf], [0.0, 0.0]])
    mean, ci95, num_nonfinite = metrics.mean_and_ci95(values)
    assert np.isnan(mean).all()
    assert np.isnan(ci95).all()
    assert num_nonfinite == 2


def test_mean_of_no_tasks():
    with pytest.raises(ValueError, match="at least one task"):
        metrics.mean_and_ci95(np.zeros((0, 3)))


def test_nearest_neighbor():
    support = {"inputs": jnp.array([[[0.0, 0.0]], [[4.0, 4.0]]]), "targets": jnp.array([1, 0])}
    query = {
        "inputs": jnp.array([[[1.0, 0.0]], [[3.0, 4.0]], [[9.0, 9.0]]]),
        "targets": jnp.array([1, 0, 1]),
    }
    assert metrics.nearest_neighbor(jaxmaml.Task(support, query)) == pytest.approx(2 / 3)


def test_nearest_neighbor_on_features_leaves_padding_out():
    """The second input is noise to the features; the padded support example would be nearest."""
    support = {
        "inputs": jnp.array([[0.0, 9.0], [4.0, 0.0], [1.0, 0.0]]),
        "targets": jnp.array([0, 1, 1]),
        "weights": jnp.array([1.0, 1.0, 0.0]),
    }
    query = {
        "inputs": jnp.array([[1.0, 0.0], [3.0, 9.0], [0.0, 0.0]]),
        "targets": jnp.array([0, 1, 1]),
        "weights": jnp.array([1.0, 1.0, 0.0]),
    }
    task = jaxmaml.Task(support, query)
    features_fn = lambda batch: batch["inputs"][:, :1]
    assert metrics.nearest_neighbor(task, features_fn) == 1
    assert metrics.nearest_neighbor(task) == 0
    dead = lambda batch: features_fn(batch) * jnp.nan
    assert np.isnan(metrics.nearest_neighbor(task, dead))


def _neighbors(**support):
    batch = {"inputs": jnp.array([[0.0], [4.0]]), "targets": jnp.array([0, 1])}
    return jaxmaml.Task({**batch, **support}, batch)


def test_nearest_neighbor_refuses_what_it_would_score_wrong():
    for targets in (jnp.array([[0], [1]]), jnp.array([0])):
        with pytest.raises(ValueError, match=r"targets \[num_examples\]"):
            metrics.nearest_neighbor(_neighbors(targets=targets))
    with pytest.raises(TypeError, match="targets must be integer"):
        metrics.nearest_neighbor(_neighbors(targets=jnp.array([0.0, 1.0])))
    negative = _neighbors(weights=jnp.array([1.0, -1.0]))
    with pytest.raises(ValueError, match="weights must be 0 or more"):
        metrics.nearest_neighbor(negative)
    assert np.isnan(jax.jit(metrics.nearest_neighbor)(negative))


def test_nearest_neighbor_of_nothing_but_padding_is_nan_and_padding_may_hold_anything():
    assert np.isnan(metrics.nearest_neighbor(_neighbors(weights=jnp.zeros(2))))
    padded = _neighbors(inputs=jnp.array([[0.0], [jnp.nan]]), weights=jnp.array([1.0, 0.0]))
    assert metrics.nearest_neighbor(padded) == 0.5


def test_the_mean_of_complex_values_is_refused():
    with pytest.raises(TypeError, match="real numbers"):
        metrics.mean_and_ci95(np.array([1j, 2.0]))


@pytest.mark.parametrize("offset", [0.0, 1e4, -3e6])
def test_the_nearest_neighbor_does_not_depend_on_the_origin(offset):
    support = {"inputs": jnp.array([[0.0], [1.0], [7e7]]) + offset, "targets": jnp.array([0, 1, 1]),
               "weights": jnp.array([1.0, 1.0, 0.0])}  # fmt: skip
    query = {"inputs": jnp.array([[1.0], [0.0]]) + offset, "targets": jnp.array([1, 0])}
    assert metrics.nearest_neighbor(jaxmaml.Task(support, query)) == 1
