"""Probes: each against a number that is computed in another way."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmaml
from jaxmaml.averaging import with_average
from jaxmaml.experiments import probes
from jaxmaml.types import Task

LOSS = lambda params, batch: jnp.mean((params - batch) ** 2) / 2
OPTIMIZER = optax.sgd(0.1)


def _classification(gap):
    """Two tasks of two classes on a line: classes `gap` apart, so that neighbors are known."""
    support = jnp.array([[[0.0], [10.0]]] * 2)
    query = jnp.array([[[1.0], [10.0 - gap]]] * 2)
    targets = jnp.array([[0, 1]] * 2)
    return Task({"inputs": support, "targets": targets}, {"inputs": query, "targets": targets})


@pytest.mark.parametrize(("gap", "expected"), [(1.0, 1.0), (9.0, 0.5)])
def test_the_nearest_neighbor_on_pixels(gap, expected):
    assert probes.nearest_neighbor_on_pixels([_classification(gap)], 2) == expected


def test_only_the_tasks_that_count_are_averaged():
    batches = [_classification(1.0), _classification(9.0)]
    assert probes.nearest_neighbor_on_pixels(batches, 2) == 1.0
    assert probes.nearest_neighbor_on_pixels(batches, 3) == pytest.approx(2.5 / 3)


def test_the_nearest_neighbor_on_features():
    learner = jaxmaml.maml(lambda params, batch: jnp.mean(params**2), optax.sgd(0.1), 1)
    state = jaxmaml.init_state(learner, OPTIMIZER, jnp.array(1.0))
    # Features that fold the line: the query at 1 becomes the neighbor of the support at 10.
    fold = lambda params, batch: params * jnp.where(batch["inputs"] == 1.0, 10.0, batch["inputs"])
    tasks = [_classification(1.0)]
    assert probes.nearest_neighbor_on_features(learner, fold, state, tasks, 2) == 0.5


def test_flops_grow_with_the_tasks():
    loss = lambda params, batch: jnp.mean((batch @ params) ** 2)
    learner = jaxmaml.maml(loss, optax.sgd(0.1), 1)
    state = jaxmaml.init_state(learner, OPTIMIZER, jnp.ones((8, 8)))
    flops = [
        probes.flops_per_outer_step(
            learner, OPTIMIZER, state, Task(*[jnp.ones((num_tasks, 64, 8))] * 2), 1
        )
        for num_tasks in (2, 4)
    ]
    # One product of the loss costs 2 * 64 * 8 * 8 operations per task.
    assert flops[0] > 2 * 3 * 2 * 64 * 8 * 8
    assert flops[1] == pytest.approx(2 * flops[0], rel=0.05)


def test_gradient_agreement_on_a_quadratic():
    # With loss a (p - b)^2 / 2 per coordinate, the exact meta-gradient is (1 - rate a) times the
    # first-order one.
    scale = jnp.array([1.0, 4.0])
    loss = lambda params, batch: jnp.sum(scale * (params - batch) ** 2) / 2
    exact = jaxmaml.maml(loss, optax.sgd(0.1), 1)
    first = jaxmaml.fomaml(loss, optax.sgd(0.1), 1)
    state = jaxmaml.init_state(exact, OPTIMIZER, jnp.zeros(2))
    tasks = Task(jnp.ones((1, 2)), jnp.ones((1, 2)))
    cosine, ratio = probes.gradient_agreement(exact, first, state, tasks)
    shrink = 1 - 0.1 * np.asarray(scale)
    first_grad = -np.asarray(scale) * shrink
    exact_grad = first_grad * shrink
    norms = np.linalg.norm(first_grad), np.linalg.norm(exact_grad)
    assert ratio == pytest.approx(norms[0] / norms[1], rel=1e-5)
    assert cosine == pytest.approx(first_grad @ exact_grad / np.prod(norms), rel=1e-5)


def test_cg_residuals_are_zero_at_a_solution_and_not_before():
    tasks = Task(jnp.ones((2, 4)), jnp.ones((2, 4)))
    for num_inner_steps, rate, is_solved in ((1, 0.5, True), (1, 0.1, False)):
        learner = jaxmaml.imaml(LOSS, optax.sgd(rate), num_inner_steps)
        state = jaxmaml.init_state(learner, OPTIMIZER, jnp.array(0.0))
        solved, _, minimum = probes.cg_residuals(learner, state, tasks)
        assert solved == pytest.approx(0.0, abs=1e-6)
        assert (minimum < 1e-6) == is_solved
        if not is_solved:
            # The inner gradient starts at -1 and has slope 2.
            assert minimum == pytest.approx(1 - 2 * rate, rel=1e-5)


def test_cg_residuals_of_a_network_with_statistics():
    # The inner loss depends on the state: its minimum is where the parameters equal the state.
    @jaxmaml.with_state
    def loss_fn(params, batch, state):
        return jnp.mean((params - batch * state) ** 2), state

    learner = jaxmaml.imaml(loss_fn, optax.sgd(0.5), 1)
    state = jaxmaml.init_state(learner, OPTIMIZER, jnp.array(0.0), jnp.array(3.0))
    tasks = Task(jnp.ones((2, 4)), jnp.full((2, 4), 2.0))
    solved, *_ = probes.cg_residuals(learner, state, tasks)
    assert solved == pytest.approx(0.0, abs=1e-6)


def test_probes_use_the_average_of_the_parameters():
    learner = jaxmaml.maml(lambda params, batch: jnp.mean(params**2), optax.sgd(0.1), 1)
    state = jaxmaml.init_state(learner, with_average(OPTIMIZER, 0.9), jnp.array(1.0))
    broken = state._replace(params=jnp.array(jnp.nan))
    features = lambda params, batch: params * batch["inputs"]
    found = probes.nearest_neighbor_on_features(
        learner, features, broken, [_classification(1.0)], 2
    )
    assert found == 1.0
