"""Adjoints and query weights of MAML against what they are made of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close
from jax.flatten_util import ravel_pytree
from learner_cases import SGD, meta_gradient, one_task
from problems import quadratic, smooth

import jaxmaml


@pytest.mark.usefixtures("x64")
def test_the_last_exact_steps_are_exact_and_those_before_are_constants():
    problem = smooth(jnp.float64)
    params, task = one_task(problem)
    learner = jaxmaml.maml(problem.loss_fn, SGD, 5, adjoint=jaxmaml.Exact(last=2))
    first = jaxmaml.adapt(problem.loss_fn, params, task.support, SGD, 3)[0]
    last = jaxmaml.maml(problem.loss_fn, SGD, 2)
    expected = meta_gradient(last, first, task)
    found = meta_gradient(learner, params, task)
    np.testing.assert_allclose(ravel_pytree(found)[0], ravel_pytree(expected)[0], rtol=1e-12)


def test_the_adjoint_is_annealed_by_the_outer_step():
    problem = quadratic()
    params, task = one_task(problem)
    make = functools.partial(jaxmaml.maml, problem.loss_fn, SGD, 3)
    first, exact = jaxmaml.FirstOrder(), jaxmaml.Exact()
    learner = make(adjoint=jaxmaml.Annealed(first, exact, at=10))
    gradient = jax.jit(lambda step: meta_gradient(learner, params, task, step=step))
    of_first, of_exact = (
        meta_gradient(make(adjoint=adjoint), params, task) for adjoint in (first, exact)
    )
    for step, expected in ((0, of_first), (9, of_first), (10, of_exact), (500, of_exact)):
        np.testing.assert_allclose(gradient(step), expected, rtol=1e-6)


def test_multi_step_loss_weighs_every_step_and_ends_at_the_last():
    problem = quadratic()
    params, task = one_task(problem)
    learner = jaxmaml.maml(problem.loss_fn, SGD, 3, query_weights=jaxmaml.multi_step_weights(3, 10))
    score = lambda adapted, state: problem.loss_fn(adapted, task.query)
    losses = learner.trace(params, task.support, score)[1:]
    loss, info = learner.loss(params, task, step=0)
    np.testing.assert_allclose(loss, losses.mean(), rtol=1e-6)
    np.testing.assert_allclose(info.query_loss, losses[-1], rtol=1e-6)
    for step in (10, 1000):
        late, info = learner.loss(params, task, step=step)
        assert late == info.query_loss
        np.testing.assert_allclose(late, losses[-1], rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_once_the_multi_step_loss_has_ended_the_gradient_is_the_plain_one():
    problem = smooth(jnp.float64)
    plain, annealed = (
        jaxmaml.maml(problem.loss_fn, SGD, 3, query_weights=weights)
        for weights in (None, jaxmaml.multi_step_weights(3, 10))
    )
    grad = jax.jit(lambda learner, step: _mean_gradient(learner, problem, step), static_argnums=0)
    assert_close(grad(annealed, 10), grad(plain, 10), 1e-12)
    weighted = jaxmaml.maml(problem.loss_fn, SGD, 3, query_weights=_annealed_weights(4))
    assert_close(grad(annealed, 4), grad(weighted, 4), 1e-12)


def _annealed_weights(step):
    """The constant weights of 3 inner steps at an outer step of 10."""
    others = (1 - step / 10) / 3
    return np.array([others, others, 1 - 2 * others])


def _mean_gradient(learner, problem, step):
    return jaxmaml.meta_grad(learner, problem.params, problem.tasks, step=step, chunk_size=None)[1]


@pytest.mark.parametrize("chunk_size", [1, None])
def test_query_passes_without_weight_are_skipped_for_a_chunk_of_tasks_too(chunk_size):
    """The passes that run are counted, forward and backward; a select would run both branches."""
    problem, passes = quadratic(), []

    def query_loss_fn(params, batch):
        jax.debug.callback(lambda: passes.append(1))
        return problem.loss_fn(params, batch)

    learner = jaxmaml.maml(
        problem.loss_fn, SGD, 3,
        query_loss_fn=query_loss_fn, query_weights=jaxmaml.multi_step_weights(3, 10),
    )  # fmt: skip

    @jax.jit
    def grad(step):
        return jaxmaml.meta_grad(
            learner, problem.params, problem.tasks, step=step, chunk_size=chunk_size
        )[1]

    def passes_at(step):
        passes.clear()
        jax.block_until_ready(grad(step))
        jax.effects_barrier()
        return len(passes)

    before, after = passes_at(9), passes_at(10)
    assert after > 0
    assert before >= 3 * after
