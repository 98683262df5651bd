"""Schedules over the outer steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import quadratic

import jaxmaml
from jaxmaml.schedules import weights_at


@pytest.mark.parametrize("num_epochs", [10, 50])
def test_multi_step_weights_are_those_of_the_authors_at_the_start_of_each_epoch(num_epochs):
    """Over 50 epochs their floor of 3 % is reached, over the 10 of their paper it is not."""
    schedule = jax.jit(jaxmaml.multi_step_weights(5, num_epochs * 500))
    for epoch in range(num_epochs + 2):
        weights = schedule(epoch * 500)
        np.testing.assert_allclose(weights, _authors_weights(5, epoch, num_epochs), atol=1e-7)
        np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-6)


def _authors_weights(num_steps, epoch, num_epochs):
    """The weights of the target losses in the code of MAML++, one value at a time."""
    if epoch >= num_epochs:  # the loss after the last step, and no other target pass
        return [0.0] * (num_steps - 1) + [1.0]
    lost_per_epoch, floor = 1 / num_steps / num_epochs, 0.03 / num_steps
    others = max(1 / num_steps - epoch * lost_per_epoch, floor)
    last = 1 / num_steps + epoch * (num_steps - 1) * lost_per_epoch
    return [others] * (num_steps - 1) + [min(last, 1 - (num_steps - 1) * floor)]


def test_a_schedule_of_another_number_of_inner_steps_is_refused():
    with pytest.raises(ValueError, match=r"query_weights must be .* \[3\]; got \[5\]"):
        jaxmaml.maml(
            lambda params, batch: params, optax.sgd(0.1), 3,
            query_weights=jaxmaml.multi_step_weights(5, 10),
        )  # fmt: skip


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
