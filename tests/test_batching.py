"""Chunks of tasks: their size, the weights of tasks, and what is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import conv4, smooth

import jaxmaml
from jaxmaml import batching, rewriting

LOSS = lambda params, batch: jnp.mean((params - batch) ** 2) / 2
LEARNER = jaxmaml.maml(LOSS, optax.sgd(0.5), 1)


def _tasks(*values):
    rows = jnp.array(values)[:, None] * jnp.ones((1, 2))
    return jaxmaml.Task(rows, rows)


@pytest.mark.parametrize(
    ("limit", "expected"), [(None, 4), (1, 1), (7, 3), (100, 4)], ids=["unknown", "1", "7", "100"]
)
def test_auto_chunk_size_is_what_fits_into_half_the_memory(monkeypatch, limit, expected):
    """`limit` in units of what a task takes."""
    problem = smooth()
    learner = jaxmaml.maml(problem.loss_fn, optax.sgd(0.1), 2)
    task_bytes = batching.task_bytes(learner, problem.params, problem.tasks)

    class Device:
        def memory_stats(self):
            return None if limit is None else {"bytes_limit": limit * task_bytes}

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    size = batching.chunk_size_of("auto", learner, problem.params, problem.tasks, ())
    assert size == expected


@pytest.mark.parametrize(
    "adjoint", [jaxmaml.Exact(), pytest.param(jaxmaml.FirstOrder(), marks=pytest.mark.slow)]
)
def test_the_estimate_of_the_memory_of_a_task_has_the_right_size(adjoint):
    problem = conv4()
    learner = jaxmaml.maml(problem.loss_fn, optax.sgd(0.1), 3, adjoint=adjoint)
    run = lambda params, tasks: jaxmaml.meta_grad(learner, params, tasks, chunk_size=None)[:2]
    analysis = jax.jit(run).lower(problem.params, problem.tasks).compile().memory_analysis()
    assert analysis is not None
    estimate = 4 * batching.task_bytes(learner, problem.params, problem.tasks)
    assert 0.3 < estimate / analysis.temp_size_in_bytes < 3


@pytest.mark.parametrize("chunk_size", [0, -1, 1.5, "all", True])
def test_wrong_chunk_sizes_are_refused(chunk_size):
    with pytest.raises((ValueError, TypeError), match="chunk_size must be an integer, 1 or more"):
        jaxmaml.meta_grad(LEARNER, jnp.array(0.0), _tasks(1.0, 2.0), chunk_size=chunk_size)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.0, 0.0], "all zero"),
        ([1.0, -1.0], "not negative"),
        ([1.0, np.nan], "finite"),
        ([1.0], r"\[num_tasks\] = \[2\]"),
    ],
)
def test_wrong_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        jaxmaml.meta_grad(LEARNER, jnp.array(0.0), _tasks(1.0, 2.0), weights=jnp.array(weights))


def test_all_zero_weights_under_jit_give_nan():
    run = jax.jit(
        lambda w: jaxmaml.meta_grad(LEARNER, jnp.array(0.0), _tasks(1.0, 2.0), weights=w)[:2]
    )
    assert np.isnan(run(jnp.zeros(2))).all()


_SQUARE = jaxmaml.maml(lambda params, batch: jnp.mean((params - batch) ** 2), optax.sgd(0.1), 1)


def _weighted(weights, chunk_size):
    tasks = jaxmaml.Task(jnp.ones((2, 3)), jnp.ones((2, 3)))
    return jaxmaml.meta_grad(
        _SQUARE, jnp.array(0.0), tasks, weights=weights, chunk_size=chunk_size
    )[:2]


_traced_weights = jax.jit(_weighted, static_argnums=1)


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("weights", [[-1.0, 1.0], [np.nan, 1.0], [np.inf, 1.0], [0.0, 0.0]])
def test_wrong_weights_are_refused_or_where_they_are_traced_nan(weights, chunk_size):
    with pytest.raises(ValueError, match="finite, not negative and not all zero"):
        _weighted(np.array(weights), chunk_size)
    assert np.isnan(_traced_weights(np.array(weights), chunk_size)).all()


def _convolved(params, batch):
    """A model that calls XLA's convolution, as the layers of Flax, Haiku and Equinox do."""
    return jax.lax.conv(batch["x"], params["kernel"], (1, 1), "SAME").sum((1, 2, 3))


def _step(apply_fn, traced, *, chunk_size):
    """A meta-gradient over four tasks, compiled but not run; `traced` grows with each trace."""

    def loss_fn(params, batch):
        traced.append(1)
        return jnp.mean(apply_fn(params, batch) ** 2)

    batch = {"x": jnp.ones((4, 2, 1, 4, 4))}
    learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), 2)
    run = lambda params: jaxmaml.meta_grad(
        learner, params, jaxmaml.Task(batch, batch), chunk_size=chunk_size
    )[:2]
    return jax.jit(run).trace({"kernel": jnp.ones((3, 1, 3, 3))})


@pytest.mark.parametrize("chunk_size", [None, 2, 1])
def test_slow_convolutions_are_told_once_with_their_cure(chunk_size):
    slow, fast = [], []
    with pytest.warns(UserWarning, match=r"wrap the model in jaxmaml.nn.fast_conv") as caught:
        _step(_convolved, slow, chunk_size=chunk_size)
    assert len(caught) == 1
    _step(jaxmaml.nn.fast_convolutions(_convolved), fast, chunk_size=chunk_size)
    assert len(slow) == len(fast)


def test_convolutions_that_are_not_adapted_are_not_told():
    frozen = jnp.ones((3, 1, 3, 3))
    apply_fn = lambda params, batch: _convolved({"kernel": frozen}, batch) * params["kernel"].sum()
    for chunk_size in (None, 1):
        _step(apply_fn, [], chunk_size=chunk_size)


def test_the_convolutions_of_other_backends_are_not_told(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    _step(_convolved, [], chunk_size=None)


@pytest.mark.parametrize("chunk_size", [None, 2, 1])
def test_an_evaluation_tells_of_slow_convolutions_too(chunk_size):
    batch = {"x": jnp.ones((4, 2, 1, 4, 4))}
    loss_fn = lambda params, batch: jnp.mean(_convolved(params, batch) ** 2)
    learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), 1)
    params = {"kernel": jnp.ones((3, 1, 3, 3))}
    meta_state = jaxmaml.init_state(learner, optax.sgd(0.1), params)
    tasks = jaxmaml.Task(batch, batch)
    with pytest.warns(UserWarning, match=r"nn.fast_convolutions"):
        jaxmaml.evaluate(learner, loss_fn, meta_state, tasks, chunk_size=chunk_size)


def test_sums_over_tasks_are_not_rounded_by_an_accelerator():
    """A loss without products: those that are left are ours."""
    loss_fn = jaxmaml.with_state(
        lambda params, batch, state: (jnp.mean((params - batch) ** 2), state + batch.mean())
    )
    options: Any = {"query_weights": jaxmaml.multi_step_weights(2, 10)}
    learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), 2, **options)
    tasks = jaxmaml.Task(jnp.ones((3, 2)), jnp.ones((3, 2)))
    grad = lambda params, state: jaxmaml.meta_grad(learner, params, tasks, state=state)
    program = jax.make_jaxpr(grad)(jnp.zeros(2), jnp.zeros(()))
    products = [
        eqn.params["precision"]
        for eqn, _ in rewriting.operations(program.jaxpr)
        if eqn.primitive.name == "dot_general"
    ]
    assert products
    assert set(products) == {(jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)}
