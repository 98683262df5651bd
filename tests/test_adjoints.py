"""Adjoints as values: what they refuse, and the implicit one against a dense solve."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparing import assert_close
from problems import quadratic, smooth

import jaxmaml

WRONG: Any = "backward"
EXACT, FIRST = jaxmaml.Exact(), jaxmaml.FirstOrder()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: jaxmaml.Exact(mode=WRONG), ValueError, "mode must be one of"),
        (lambda: jaxmaml.Exact(last=-1), ValueError, "last must be an integer, 0 or more; got -1"),
        (lambda: jaxmaml.Exact(checkpoint_every=0), ValueError, "checkpoint_every must be"),
        (lambda: jaxmaml.FirstOrder(checkpoint_every=WRONG), TypeError, "checkpoint_every must be"),
        (
            lambda: jaxmaml.Exact(unroll=0),
            ValueError,
            "unroll must be an integer, 1 or more; got 0",
        ),
        (
            lambda: jaxmaml.Exact(unroll=True),
            TypeError,
            "unroll must be an integer, 1 or more; got",
        ),
        (
            lambda: jaxmaml.Exact(checkpoint_every=2, unroll=3),
            ValueError,
            "unroll must be at most checkpoint_every=2, the number of steps of a segment; got 3",
        ),
        (lambda: jaxmaml.FirstOrder(unroll=-1), ValueError, "unroll must be"),
        (
            lambda: jaxmaml.FirstOrder(checkpoint_every=1, unroll=2),
            ValueError,
            "at most checkpoint",
        ),
        (lambda: jaxmaml.Implicit(unroll=WRONG), TypeError, "unroll must be"),
        (lambda: jaxmaml.Implicit(num_cg_steps=0), ValueError, "num_cg_steps must be"),
        (lambda: jaxmaml.Implicit(damping=-1.0), ValueError, "damping must be a finite number"),
        (lambda: jaxmaml.Implicit(cg_tol=float("nan")), ValueError, "cg_tol must be"),
        (lambda: jaxmaml.Annealed(FIRST, EXACT, at=-1), ValueError, "at must be an integer, 0"),
        (lambda: jaxmaml.Annealed(WRONG, EXACT, at=1), TypeError, "before must be an adjoint"),
        (
            lambda: jaxmaml.Annealed(FIRST, jaxmaml.Annealed(FIRST, EXACT, 1), 2),
            TypeError,
            "after must not be annealed itself",
        ),
    ],
)
def test_values_out_of_range_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_equal_adjoints_are_equal_values():
    assert jaxmaml.Exact(last=2) == jaxmaml.Exact(last=2) != jaxmaml.Exact(last=3)
    assert len({jaxmaml.Exact(), jaxmaml.Exact(), jaxmaml.FirstOrder()}) == 2


def test_adapt_has_no_outer_step_to_anneal_by():
    loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2)
    adjoint = jaxmaml.Annealed(FIRST, EXACT, at=1)
    with pytest.raises(ValueError, match="chooses by the outer step"):
        jaxmaml.adapt(loss_fn, jnp.array(0.0), jnp.ones(2), optax.sgd(0.1), 1, adjoint=adjoint)
    learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), 1, adjoint=adjoint)
    assert float(learner.adapt(jnp.array(0.0), jnp.ones(2))[0]) == pytest.approx(0.2)


@pytest.mark.parametrize(("last", "expected"), [(0, FIRST), (3, EXACT), (9, EXACT)])
def test_the_number_of_exact_steps_ends_at_first_order_and_at_exact(last, expected):
    problem = quadratic()
    task = jax.tree.map(lambda leaf: leaf[0], problem.tasks)
    found, wanted = (
        jax.grad(jaxmaml.maml(problem.loss_fn, optax.sgd(0.1), 3, adjoint=a).loss, has_aux=True)(
            problem.params, task
        )[0]
        for a in (jaxmaml.Exact(last=last), expected)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def _quadratic_grads(adjoint, num_inner_steps):
    """(a jitted function of (params, task): the meta-gradient and the inner losses; its arguments)."""
    problem = quadratic()
    task = jax.tree.map(lambda leaf: leaf[0], problem.tasks)
    learner = jaxmaml.maml(problem.loss_fn, optax.sgd(0.1), num_inner_steps, adjoint=adjoint)
    grads = lambda params, task: jax.grad(learner.loss, has_aux=True)(params, task)
    return jax.jit(grads), (problem.params, task)


@pytest.mark.parametrize(
    ("adjoint", "num_exact"),
    [
        (jaxmaml.Exact(unroll=2), 5),  # with a rest
        (jaxmaml.Exact(unroll=9), 5),  # all of them
        (jaxmaml.Exact(mode="reverse", unroll=2), 5),
        (jaxmaml.Exact(checkpoint_every=3, unroll=2), 5),
        (jaxmaml.Exact(last=3, unroll=2), 3),
        (jaxmaml.FirstOrder(unroll=2), 0),
        (jaxmaml.Implicit(unroll=2), None),
    ],
)
def test_steps_that_are_unrolled_give_the_same_gradient(adjoint, num_exact):
    grads, (params, task) = _quadratic_grads(adjoint, 5)
    found, info = grads(params, task)
    center, target = task.support.mean(0), task.query.mean(0)
    path = [center + 0.9**i * (params - center) for i in range(6)]
    if num_exact is None:  # the minimum does not depend on the parameters
        np.testing.assert_allclose(found, 0.0, atol=1e-6)
    else:
        np.testing.assert_allclose(found, 0.9**num_exact * (path[5] - target), rtol=1e-5)
    losses = [jnp.mean(jnp.sum((point - task.support) ** 2, axis=-1)) / 2 for point in path[:5]]
    np.testing.assert_allclose(info.inner_losses, losses, rtol=1e-5)


def _num_operations(adjoint, num_inner_steps):
    grads, args = _quadratic_grads(adjoint, num_inner_steps)
    return grads.lower(*args).as_text().count(" = ")


@pytest.mark.parametrize("kind", [jaxmaml.Exact, jaxmaml.FirstOrder])
def test_a_program_grows_with_the_steps_of_its_body_and_not_with_the_inner_steps(kind):
    rolled, unrolled = _num_operations(kind(), 20), _num_operations(kind(unroll=4), 20)
    assert _num_operations(kind(), 2) == rolled < unrolled
    assert unrolled == _num_operations(kind(unroll=4), 40)


@pytest.mark.parametrize("damping", [0.0, 3.0])
@pytest.mark.usefixtures("x64")
def test_implicit_solves_the_damped_system(damping):
    """adapted = (c_s + theta) / 2 with the Hessian 2 I: the meta-gradient is g / (2 + damping)."""
    problem = quadratic(jnp.float64)
    task = jax.tree.map(lambda leaf: leaf[0], problem.tasks)
    learner = jaxmaml.imaml(
        problem.loss_fn, optax.sgd(0.45), 100, num_cg_steps=50, cg_tol=1e-14, damping=damping
    )
    adapted = (task.support.mean(0) + problem.params) / 2
    expected = (adapted - task.query.mean(0)) / (2 + damping)
    found, _ = jax.grad(learner.loss, has_aux=True)(problem.params, task)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_views_along_an_implicit_loop_have_no_derivative():
    problem = smooth()
    task = jax.tree.map(lambda leaf: leaf[0], problem.tasks)
    learner = jaxmaml.imaml(problem.loss_fn, optax.sgd(0.1), 3)
    view = lambda adapted, state: problem.loss_fn(adapted, task.query)
    losses = learner.trace(problem.params, task.support, view)
    assert losses.shape == (4,)
    with pytest.raises(TypeError, match="after the last inner step only"):
        jax.grad(lambda params: learner.trace(params, task.support, view)[-1])(problem.params)
    weighted = jaxmaml.imaml(problem.loss_fn, optax.sgd(0.1), 3, query_weights=jnp.ones(3) / 3)
    with pytest.raises(TypeError, match="use Exact"):
        jax.grad(weighted.loss, has_aux=True)(problem.params, task)


@pytest.mark.usefixtures("x64")
def test_hessian_vector_products_of_the_meta_loss_agree_in_every_mode():
    problem = smooth(jnp.float64)
    task = jax.tree.map(lambda leaf: leaf[0], problem.tasks)

    def product(mode):
        adjoint = jaxmaml.Exact(mode=mode)
        loss = jaxmaml.maml(problem.loss_fn, optax.sgd(0.1), 2, adjoint=adjoint).loss
        grad = lambda params: jax.grad(loss, has_aux=True)(params, task)[0]
        return jax.jvp(grad, (problem.params,), (problem.params,))[1]

    expected = jax.jit(lambda: product("reverse"))()
    for mode in ("forward_over_reverse", "checkpoint"):
        assert_close(jax.jit(lambda mode=mode: product(mode))(), expected, 1e-10)


def test_implicit_carries_a_complex_state():
    loss_fn = jaxmaml.with_state(
        lambda params, batch, state: (jnp.mean((params - batch) ** 2), state * (1 + 2j))
    )
    found = []
    for adjoint in (jaxmaml.Implicit(), jaxmaml.Exact()):
        learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), 2, adjoint=adjoint)
        task = jaxmaml.Task(jnp.ones(2), jnp.ones(2))
        found.append(learner.loss(jnp.zeros(2), task, state=jnp.complex64(1j))[1].state)
    assert found[0] == found[1]
