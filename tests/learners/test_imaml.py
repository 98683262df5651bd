"""iMAML against a dense linear solve."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from learner_cases import meta_gradient, one_task
from problems import smooth

import jaxmaml


@pytest.mark.usefixtures("x64")
def test_imaml_is_a_dense_linear_solve():
    """At parameters that are not a minimum yet: the formula is the same."""
    problem = smooth(jnp.float64)
    params, task = one_task(problem)
    learner = jaxmaml.imaml(
        problem.loss_fn, optax.sgd(0.3), 4, proximal=2.0, num_cg_steps=200, cg_tol=1e-14
    )

    @jax.jit
    def solved(params):
        adapted, unravel = ravel_pytree(learner.adapt(params, task.support)[0])
        of = lambda batch: lambda flat: problem.loss_fn(unravel(flat), batch)
        matrix = jax.hessian(of(task.support))(adapted) / 2.0 + jnp.eye(len(adapted))
        return jnp.linalg.solve(matrix, jax.grad(of(task.query))(adapted))

    expected, found = solved(params), ravel_pytree(meta_gradient(learner, params, task))[0]
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)
