"""The residual of conjugate gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
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
        residual = jax.jit(functools.partial(diagnostics.cg_residual, learner))
        found = residual(params, task)
        left[num_cg_steps], gradient = found.solver, found.minimum
        assert gradient < 1e-6
    assert left[100] < 1e-10
    assert left[1] > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"test_loss_fn": lambda params, batch: jnp.mean((params - 9) ** 2)},
        {"at_step": lambda params, batch, step: (params, batch + 1)},
        {"at_step": lambda params, batch, step: (params + 1, batch)},
    ],
    ids=["test loss", "batch at step", "parameters at step"],
)
@pytest.mark.usefixtures("x64")
def test_the_residual_is_that_of_training_for_every_option(options):
    """phi = (c + theta) / 2 after one step of 0.5: the gradient there is zero, the system solved."""
    loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2) / 2
    learner = jaxmaml.imaml(loss_fn, optax.sgd(0.5), 1, **options)
    task = jaxmaml.Task(support=jnp.ones(4), query=jnp.full(4, 3.0))
    residuals = diagnostics.cg_residual(learner, jnp.array(0.0), task)
    np.testing.assert_allclose(residuals, 0, atol=1e-12)
