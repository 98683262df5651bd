"""Schedules over the outer steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import quadratic

import jaxmaml
from jaxmaml.schedules import weights_at


@pytest.mark.parametrize("step", [0, 30, 99, 100, 5000])
def test_multi_step_weights_add_up_to_one_and_keep_three_percent(step):
    weights = jaxmaml.multi_step_weights(5, 100)(step)
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-6)
    np.testing.assert_allclose(weights[:-1], max(1 - step / 100, 0.03) / 5, rtol=1e-6)


def test_the_weights_may_be_any_schedule_of_the_outer_step():
    problem = quadratic()
    task = jax.tree.map(lambda leaf: leaf[0], problem.tasks)
    schedule = lambda step: jnp.where(step < 10, jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0]))
    learner = jaxmaml.maml(problem.loss_fn, optax.sgd(0.1), 2, query_weights=schedule)
    view = lambda adapted, state: problem.loss_fn(adapted, task.query)
    losses = learner.trace(problem.params, task.support, view)
    for step, expected in ((0, losses[1]), (10, 2 * losses[2])):
        loss, info = jax.jit(lambda step: learner.loss(problem.params, task, step=step))(step)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        np.testing.assert_allclose(info.query_loss, losses[2], rtol=1e-6)


@pytest.mark.parametrize("query_weights", [np.ones(3), lambda step: jnp.ones(3)])
def test_weights_of_another_length_are_refused(query_weights):
    with pytest.raises(ValueError, match=r"query_weights must be \[num_inner_steps\] = \[2\]"):
        weights_at(query_weights, 0, 2)


def test_weights_need_inner_steps():
    with pytest.raises(ValueError, match="at least one inner step"):
        jaxmaml.maml(lambda params, batch: params, optax.sgd(0.1), 0, query_weights=np.ones(0))


@pytest.mark.parametrize("numbers", [(0, 10), (5, 0)])
def test_numbers_below_one_are_refused(numbers):
    with pytest.raises(ValueError, match="must be an integer, 1 or more; got 0"):
        jaxmaml.multi_step_weights(*numbers)
