"""The residual of conjugate gradients."""

import jax
import jax.numpy as jnp
import optax
import pytest
from problems import smooth

import jaxmaml
from jaxmaml import diagnostics


@pytest.mark.usefixtures("x64")
def test_the_residual_says_whether_conjugate_gradients_converged():
    problem = smooth(jnp.float64)
    params, task = problem.params, jax.tree.map(lambda leaf: leaf[0], problem.tasks)
    left = {}
    for num_cg_steps in (1, 100):
        options = {"proximal": 2.0, "num_cg_steps": num_cg_steps, "cg_tol": 1e-12}
        learner = jaxmaml.imaml(problem.loss_fn, optax.sgd(0.3), 60, **options)
        left[num_cg_steps], gradient = diagnostics.cg_residual(learner, params, task)
        assert gradient < 1e-6
    assert left[100] < 1e-10
    assert left[1] > 1e-3
