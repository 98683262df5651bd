"""Rates per inner step."""

import jax.numpy as jnp
import numpy as np
from learner_cases import one_task
from problems import quadratic

import jaxmaml


def test_per_step_rates_are_used_in_turn_and_the_last_one_again():
    """theta - c shrinks by 1 - rate in each step."""
    problem = quadratic()
    params, task = one_task(problem)
    learner = jaxmaml.meta_sgd(problem.loss_fn, 2, granularity="scalar", per_step=True)
    meta_params = learner.init(params)
    meta_params.learned["hyperparams"] = jnp.array([0.5, 0.25])
    center = task.support.mean(0)
    for number, shrink in ((1, 0.5), (2, 0.5 * 0.75), (4, 0.5 * 0.75**3)):
        adapted, _ = learner.adapt(meta_params, task.support, num_inner_steps=number)
        np.testing.assert_allclose(adapted - center, shrink * (params - center), rtol=1e-5)
