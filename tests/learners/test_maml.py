"""Adjoints and query weights of MAML against what they are made of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
    for step, adjoint in ((0, first), (9, first), (10, exact), (500, exact)):
        found = jax.jit(lambda step: meta_gradient(learner, params, task, step=step))(step)
        expected = meta_gradient(make(adjoint=adjoint), params, task)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_multi_step_loss_weighs_every_step_and_ends_at_the_last():
    problem = quadratic()
    params, task = one_task(problem)
    learner = jaxmaml.maml(problem.loss_fn, SGD, 3, query_weights=jaxmaml.multi_step_weights(3, 10))
    score = lambda adapted, state: problem.loss_fn(adapted, task.query)
    losses = learner.trace(params, task.support, score)[1:]
    loss, info = learner.loss(params, task, step=0)
    np.testing.assert_allclose(loss, losses.mean(), rtol=1e-6)
    np.testing.assert_allclose(info.query_loss, losses[-1], rtol=1e-6)
    late, _ = learner.loss(params, task, step=1000)
    np.testing.assert_allclose(late, losses @ jnp.array([0.01, 0.01, 0.98]), rtol=1e-6)
