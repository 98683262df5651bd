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
from jaxmaml import diagnostics


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


@pytest.mark.usefixtures("x64")
def test_the_minimum_is_that_of_the_loss_in_its_last_state():
    """The derivative of enough steps is the same; before the loop the state has another minimum."""
    loss_fn = jaxmaml.with_state(
        lambda params, batch, mean: (jnp.mean((params * (batch - mean) - 1) ** 2) / 2, batch.mean())
    )
    keys = jax.random.split(jax.random.key(0))
    task = jaxmaml.Task(*(1 + jax.random.normal(key, (5,)) for key in keys))
    params, before, optimizer = jnp.array(0.3), jnp.array(-3.0), optax.sgd(0.1)
    learner = jaxmaml.imaml(loss_fn, optimizer, 300, cg_tol=1e-14)

    def proximal(theta):
        def inner_loss(phi, batch, state):
            loss, state = loss_fn(phi, batch, state)
            return loss + (phi - theta) ** 2 / 2, state

        return jaxmaml.with_state(inner_loss)

    def unrolled(theta):
        adapted, info = jaxmaml.adapt(
            proximal(theta), theta, task.support, optimizer, 300, state=before
        )
        return loss_fn(adapted, task.query, info.state)[0]

    found = jax.grad(lambda theta: learner.loss(theta, task, state=before)[0])(params)
    np.testing.assert_allclose(found, jax.grad(unrolled)(params), rtol=1e-10)
    residual = diagnostics.cg_residual(learner, params, task, state=before)
    assert residual.solver < 1e-10
    assert residual.minimum < 1e-10
