"""Ridge regression against NumPy."""

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
