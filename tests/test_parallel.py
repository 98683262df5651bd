"""Tasks over devices: the same results as on one, and the errors a user meets."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparing import assert_close
from jax.sharding import AxisType
from problems import smooth

import jaxmaml
from jaxmaml import parallel

PROBLEM = smooth()
LEARNER = jaxmaml.maml(PROBLEM.loss_fn, optax.sgd(0.1), 2)
OPTIMIZER = optax.sgd(0.1)
TASKS = PROBLEM.tasks


@pytest.mark.parametrize(("num_tasks", "size"), [(4, 4), (6, 3), (7, 1), (32, 4), (2, 2)])
def test_mesh_shares_the_tasks_evenly(num_tasks, size):
    assert parallel.task_mesh(num_tasks).shape == {parallel.TASKS: size}


@pytest.mark.parametrize("weights", [None, np.array([1.0, 0.0, 2.0, 3.0])])
def test_meta_step_is_that_of_one_device(weights):
    meta_state = jaxmaml.init_state(LEARNER, OPTIMIZER, PROBLEM.params)
    expected, metrics = jaxmaml.meta_step(LEARNER, OPTIMIZER, meta_state, TASKS, weights=weights)
    mesh = parallel.task_mesh(4)
    found, spread = jax.jit(
        lambda state, tasks: parallel.meta_step(
            LEARNER, OPTIMIZER, state, tasks, mesh=mesh, weights=weights
        )
    )(parallel.replicate(meta_state, mesh), TASKS)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )
    for name, value in metrics.items():
        np.testing.assert_allclose(spread[name], value, rtol=1e-5)


def test_evaluate_is_that_of_one_device():
    meta_state = jaxmaml.init_state(LEARNER, OPTIMIZER, PROBLEM.params)
    expected = jaxmaml.evaluate(LEARNER, PROBLEM.loss_fn, meta_state, TASKS)
    mesh = parallel.task_mesh(4)
    run = jax.jit(
        lambda meta_state, tasks: jaxmaml.evaluate(
            LEARNER, PROBLEM.loss_fn, meta_state, tasks, mesh=mesh, chunk_size=1
        )
    )
    np.testing.assert_allclose(run(meta_state, TASKS), expected, rtol=1e-5)


@pytest.mark.parametrize("source", ["function", "iterable"])
def test_fit_over_a_mesh_is_fit_on_one_device(source):
    def draw(key):
        rows = jax.random.normal(key, (4, 3))
        return jaxmaml.Task(rows, rows)

    learner = jaxmaml.maml(lambda params, batch: jnp.mean((params - batch) ** 2), optax.sgd(0.1), 1)
    meta_state = jaxmaml.init_state(learner, OPTIMIZER, jnp.array(2.0))
    key = jax.random.key(0)
    tasks = draw if source == "function" else [draw(jax.random.fold_in(key, i)) for i in range(6)]
    given = key if source == "function" else None
    finals = [
        list(jaxmaml.fit(learner, OPTIMIZER, meta_state, tasks, 6, key=given, mesh=mesh))[-1][0]
        for mesh in (None, parallel.task_mesh(4))
    ]
    np.testing.assert_allclose(finals[1].params, finals[0].params, rtol=1e-6)


def test_tasks_that_the_mesh_does_not_divide_are_refused():
    meta_state = jaxmaml.init_state(LEARNER, OPTIMIZER, PROBLEM.params)
    tasks = jax.tree.map(lambda leaf: leaf[jnp.array([0, 1, 2, 3, 0])], TASKS)
    with pytest.raises(ValueError, match="multiple of the mesh's 4 devices; got 5"):
        parallel.meta_step(LEARNER, OPTIMIZER, meta_state, tasks, mesh=parallel.task_mesh(4))


def test_the_tasks_are_spread_over_their_own_axis_of_a_mesh():
    axes = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((2, 2), ("tasks", "model"), axis_types=axes)
    meta_state = jaxmaml.init_state(LEARNER, OPTIMIZER, PROBLEM.params)
    tasks = jax.tree.map(lambda leaf: leaf[:2], TASKS)
    expected, _ = jaxmaml.meta_step(LEARNER, OPTIMIZER, meta_state, tasks)
    found, _ = jax.jit(
        lambda state, tasks: parallel.meta_step(LEARNER, OPTIMIZER, state, tasks, mesh=mesh)
    )(meta_state, tasks)
    assert_close(found.params, expected.params, 1e-5)
