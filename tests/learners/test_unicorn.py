"""UNICORN does not depend on the numbering of the classes, nor on its vector under a softmax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learner_cases import SGD, meta_gradient, one_task
from problems import smooth

import jaxmaml


def test_unicorn_does_not_depend_on_how_classes_are_numbered():
    problem = smooth()
    params, task = one_task(problem)
    learner = jaxmaml.unicorn(problem.loss_fn, SGD, 3)
    order = jnp.array([2, 0, 1])
    renumbered = jax.tree.map(lambda x: x, task)
    for batch in renumbered:
        batch["targets"] = order[batch["targets"]]
    losses = [learner.loss(learner.init(params), t)[0] for t in (task, renumbered)]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    maml = jaxmaml.maml(problem.loss_fn, SGD, 3)
    assert abs(maml.loss(params, task)[0] - maml.loss(params, renumbered)[0]) > 1e-3


@pytest.mark.parametrize("adjoint", [jaxmaml.FirstOrder(), jaxmaml.Exact()])
@pytest.mark.usefixtures("x64")
def test_under_a_softmax_the_shared_vector_cancels_and_unicorn_is_maml_with_a_zero_head(adjoint):
    problem = smooth(jnp.float64)
    params, task = one_task(problem)
    learner = jaxmaml.unicorn(problem.loss_fn, SGD, 3, adjoint=adjoint)
    grads = meta_gradient(learner, learner.init(params), task)
    for leaf in jax.tree.leaves(grads.learned):
        np.testing.assert_allclose(leaf, 0, atol=1e-15)
    maml = jaxmaml.maml(problem.loss_fn, SGD, 3, adjoint=adjoint)
    zero = {**params, "head": jax.tree.map(jnp.zeros_like, params["head"])}
    expected = meta_gradient(maml, zero, task)
    np.testing.assert_allclose(grads.params["a"]["kernel"], expected["a"]["kernel"], atol=1e-14)
    assert jnp.abs(expected["a"]["kernel"]).max() > 1e-4


def test_unicorn_is_first_order_by_default_as_in_the_authors_code():
    problem = smooth()
    params, task = one_task(problem)
    make = functools.partial(jaxmaml.unicorn, problem.loss_fn, SGD, 3)
    first, exact = jaxmaml.FirstOrder(), jaxmaml.Exact()
    default, first, exact = make(), make(adjoint=first), make(adjoint=exact)
    found, expected, other = (
        meta_gradient(learner, learner.init(params), task).params["a"]["kernel"]
        for learner in (default, first, exact)
    )
    np.testing.assert_array_equal(found, expected)
    assert jnp.abs(found - other).max() > 1e-4
