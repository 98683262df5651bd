"""Losses and updates along the inner loop against closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bowls import CURVATURE, PARAMS, TASK, counted_loss, curved, curved_after, curved_loss, task_at
from problems import smooth

import jaxmaml
from jaxmaml import diagnostics


@pytest.mark.parametrize("num_inner_steps", [None, 0, 5])
@pytest.mark.parametrize("has_state", [False, True])
def test_inner_losses_in_closed_form(num_inner_steps, has_state):
    loss_fn, state = (counted_loss, jnp.array(0.0)) if has_state else (curved_loss, ())
    learner = curved(3, loss_fn=loss_fn)
    found = diagnostics.inner_losses(
        learner, loss_fn, PARAMS, TASK, state=state, num_inner_steps=num_inner_steps
    )
    number = 3 if num_inner_steps is None else num_inner_steps
    for name, batch in TASK._asdict().items():
        batch = np.asarray(batch)
        expected = [
            has_state * n
            + sum(
                CURVATURE[layer] / 2 * ((curved_after(layer, n) - batch) ** 2).sum(-1).mean()
                for layer in CURVATURE
            )
            for n in range(number + 1)
        ]
        np.testing.assert_allclose(found[name], expected, rtol=1e-5)


def test_inner_losses_are_those_the_learner_reports():
    problem = smooth()
    task = task_at(problem.tasks, 0)
    learner = jaxmaml.maml(problem.loss_fn, optax.sgd(0.1), 3)
    found = diagnostics.inner_losses(learner, problem.loss_fn, problem.params, task)
    _, info = learner.loss(problem.params, task)
    np.testing.assert_allclose(found["support"][:-1], info.inner_losses, rtol=1e-5)
    np.testing.assert_allclose(found["query"][-1], info.query_loss, rtol=1e-5)


@pytest.mark.parametrize("has_state", [False, True])
def test_update_norms_in_closed_form(has_state):
    loss_fn, state = (counted_loss, jnp.array(0.0)) if has_state else (curved_loss, ())
    mask = lambda path: path == "head/w"
    learner = curved(2, loss_fn=loss_fn, mask=mask)
    found = diagnostics.update_norms(learner, PARAMS, TASK.support, state=state, num_inner_steps=3)
    moved = [np.linalg.norm(curved_after("head", n) - curved_after("head", 0)) for n in range(4)]
    np.testing.assert_allclose(found["head"][0], moved, rtol=1e-5)
    np.testing.assert_allclose(found["head"][1], np.array(moved) / math.sqrt(13), rtol=1e-5)
    np.testing.assert_array_equal(found["body"], np.zeros((2, 4)))


def test_a_layer_that_starts_from_zero_has_no_relative_update():
    params = PARAMS | {"head": {"w": jnp.zeros(2)}}
    norms, relative = diagnostics.update_norms(curved(1), params, TASK.support)["head"]
    np.testing.assert_allclose(norms, [0, 0.4 * math.sqrt(5)], rtol=1e-6)
    np.testing.assert_array_equal(relative, [math.nan, math.inf])


def test_update_norms_start_from_the_learners_own_parameters():
    """Meta-parameters may be more than parameters, and a head may be filled in before all steps."""
    plain = curved(2)
    start = lambda meta_params: jax.tree.map(lambda leaf: leaf + 1, meta_params["params"])
    learner = plain._replace(
        trace=lambda meta_params, *args, **options: plain.trace(
            start(meta_params), *args, **options
        )
    )
    meta_params = {"params": PARAMS, "rates": jnp.ones(3)}
    found = diagnostics.update_norms(learner, meta_params, TASK.support, depth=1)
    expected = diagnostics.update_norms(plain, start(meta_params), TASK.support)
    assert found.keys() == {"body", "head"}
    for layer in found:
        assert found[layer][0][0] == 0
        np.testing.assert_allclose(found[layer], expected[layer], rtol=1e-6)


def test_norms_in_half_precision_neither_underflow_nor_overflow():
    loss_fn = lambda params, batch: params["w"].sum() * batch
    for rate, size in ((2.0**-13, 2.0**-13 * 100), (3.0, 300.0)):
        learner = jaxmaml.maml(loss_fn, optax.sgd(rate), 1)
        params = {"w": jnp.zeros((100, 100), jnp.float16)}
        norms, _ = diagnostics.update_norms(learner, params, jnp.ones((), jnp.float16))["w"]
        np.testing.assert_allclose(norms, [0, size], rtol=1e-3)
