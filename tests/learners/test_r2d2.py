"""Ridge regression against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learner_cases import one_task
from problems import smooth

import jaxmaml


@pytest.mark.usefixtures("x64")
def test_r2d2_solves_ridge_regression():
    problem = smooth(jnp.float64)
    params, task = one_task(problem)
    learner = jaxmaml.r2d2(problem.loss_fn, problem.features_fn, ridge=0.5, scale=2.0)
    adapted, _ = learner.adapt(learner.init(params), task.support)
    x = np.asarray(problem.features_fn(params, task.support))
    y = np.eye(3)[np.asarray(task.support["targets"])]
    expected = 2.0 * np.linalg.solve(x.T @ x + 0.5 * np.eye(8), x.T @ y)
    np.testing.assert_allclose(adapted["head"]["kernel"], expected, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_an_example_of_weight_two_counts_twice():
    problem = smooth(jnp.float64)
    params, task = one_task(problem)
    learner = jaxmaml.r2d2(problem.loss_fn, problem.features_fn, ridge=0.5)
    meta_params, support = learner.init(params), task.support
    size = len(support["targets"])
    weights = jnp.array([2.0, 0.0] + [1.0] * (size - 2))
    index = jnp.array([0, 0, *range(2, size)])
    twice = {name: leaf[index] for name, leaf in support.items()}

    def kernel(weights, support):
        return learner.adapt(meta_params, {**support, "weights": weights})[0]["head"]["kernel"]

    found = kernel(weights, support)
    np.testing.assert_allclose(found, kernel(jnp.ones(size), twice), rtol=1e-9)
    slope = jax.jacobian(kernel)(weights, support)
    assert np.isfinite(slope).all()
