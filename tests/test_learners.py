"""The shared table: every learner is a row, every property a test over all rows."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec
from problems import conv4, quadratic, smooth

import jaxmaml
from jaxmaml.types import MetaLearner

RATE = 0.1


class Row(NamedTuple):
    """A learner for the table.

    Attributes:
        make: `(loss_fn, **adjoint) -> MetaLearner`.
        closed_form: `(params, task of the quadratic problem) -> meta-gradient`, or None where there
            is none in a line.
        is_derivative: whether the meta-gradient is the derivative of `learner.loss`.
        takes_adjoint: whether `make` takes `adjoint`.
    """

    make: Callable[..., MetaLearner]
    closed_form: Callable[..., Any] | None = None
    is_derivative: bool = True
    takes_adjoint: bool = True


def _sgd_closed_form(num_inner_steps, exact):
    """theta_n - c_s = (1 - RATE)^n (theta - c_s), so that its Jacobian is (1 - RATE)^n."""

    def gradient(params, task):
        shrink = (1 - RATE) ** num_inner_steps
        adapted = task.support.mean(0) + shrink * (params - task.support.mean(0))
        return (shrink if exact else 1.0) * (adapted - task.query.mean(0))

    return gradient


def _maml(optimizer, num_inner_steps, **options):
    return functools.partial(
        jaxmaml.maml, optimizer=optimizer, num_inner_steps=num_inner_steps, **options
    )


_ADAM = optax.adam(0.05, eps_root=1e-8)
ROWS = {
    "maml-0-steps": Row(_maml(optax.sgd(RATE), 0), _sgd_closed_form(0, True)),
    "maml-1-step": Row(_maml(optax.sgd(RATE), 1), _sgd_closed_form(1, True)),
    "maml-3-steps": Row(_maml(optax.sgd(RATE), 3), _sgd_closed_form(3, True)),
    "maml-10-steps": Row(_maml(optax.sgd(RATE), 10), _sgd_closed_form(10, True)),
    "maml-10-steps-in-segments": Row(
        _maml(optax.sgd(RATE), 10, checkpoint_every=3), _sgd_closed_form(10, True)
    ),
    "maml-momentum": Row(_maml(optax.sgd(RATE, momentum=0.9), 3)),
    "maml-adam": Row(_maml(_ADAM, 3)),
    "fomaml": Row(
        _maml(optax.sgd(RATE), 3, order="first"), _sgd_closed_form(3, False), is_derivative=False
    ),
    "fomaml-adam": Row(_maml(_ADAM, 3, order="first"), is_derivative=False),
}
each_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def _meta_grad(row, problem, **options):
    learner = row.make(problem.loss_fn)
    meta_params = learner.init(problem.params)
    options = {"chunk_size": None} | options
    return jax.jit(functools.partial(jaxmaml.meta_grad, learner, **options))(
        meta_params, problem.tasks
    )


def _flat(tree):
    return np.concatenate(
        [np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)]
    )


def _assert_close(found, expected, relative):
    """Over the whole tree: ||found - expected|| <= relative ||expected||."""
    found, expected = _flat(found), _flat(expected)
    assert np.linalg.norm(found - expected) <= relative * np.linalg.norm(expected)


@each_row
@pytest.mark.usefixtures("x64")
def test_closed_form_on_a_quadratic(row):
    if row.closed_form is None:
        pytest.skip("no closed form in a line")
    problem = quadratic(jnp.float64)
    expected = jax.vmap(row.closed_form, (None, 0))(problem.params, problem.tasks).mean(0)
    _assert_close(_meta_grad(row, problem)[1], expected, 1e-13)


def _central_difference(row, problem, h):
    """(derivative of the meta-loss along a random direction, the same from its gradient)."""
    learner = row.make(problem.loss_fn)
    loss = jax.jit(lambda params: jaxmaml.meta_grad(learner, params, problem.tasks)[0])
    flat, unravel = ravel_pytree(learner.init(problem.params))
    along = np.random.default_rng(1).normal(size=flat.shape)
    difference = (loss(unravel(flat + h * along)) - loss(unravel(flat - h * along))) / (2 * h)
    return difference, ravel_pytree(_meta_grad(row, problem)[1])[0] @ along


@each_row
@pytest.mark.parametrize("problem", [quadratic, smooth])
@pytest.mark.usefixtures("x64")
def test_central_differences(row, problem):
    if not row.is_derivative:
        pytest.skip("the meta-gradient is not the derivative of the loss, by definition")
    difference, derivative = _central_difference(row, problem(jnp.float64), 1e-6)
    np.testing.assert_allclose(derivative, difference, rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_central_differences_of_a_network_with_kinks():
    difference, derivative = _central_difference(ROWS["maml-3-steps"], conv4(jnp.float64), 1e-7)
    np.testing.assert_allclose(derivative, difference, rtol=1e-6)


@each_row
@pytest.mark.usefixtures("x64")
def test_every_adjoint_gives_the_same(row):
    if not row.takes_adjoint:
        pytest.skip("has no adjoint to choose")
    _assert_adjoints_agree(row, smooth(jnp.float64))


@pytest.mark.usefixtures("x64")
def test_every_adjoint_gives_the_same_on_a_convolutional_network():
    _assert_adjoints_agree(ROWS["maml-3-steps"], conv4(jnp.float64))


def _assert_adjoints_agree(row, problem):
    expected = _meta_grad(row._replace(make=_with_adjoint(row, "reverse")), problem)[1]
    for adjoint in ("forward_over_reverse", "checkpoint"):
        found = _meta_grad(row._replace(make=_with_adjoint(row, adjoint)), problem)[1]
        _assert_close(found, expected, 1e-10)


def _with_adjoint(row, adjoint):
    return functools.partial(row.make, adjoint=adjoint)


@each_row
def test_vmap_equals_a_loop_and_every_chunk_size_agrees(row):
    problem = smooth()
    learner = row.make(problem.loss_fn)
    grad = jax.jit(jax.grad(learner.loss, has_aux=True))
    one_by_one = [
        grad(learner.init(problem.params), jax.tree.map(lambda x: x[i], problem.tasks))[0]  # noqa: B023
        for i in range(5)
    ]
    expected = jax.tree.map(lambda *x: np.mean(x, axis=0), *one_by_one)
    for chunk_size in (None, 1, 2, 7):
        loss, grads, info = _meta_grad(row, problem, chunk_size=chunk_size)
        _assert_close(grads, expected, 2e-5)
        assert info.query_loss.shape == (5,)
        np.testing.assert_allclose(loss, info.query_loss.mean(), rtol=1e-5)


@each_row
@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_every_device_count_gives_the_same_gradient(row, num_devices):
    problem = smooth()
    tasks = jax.tree.map(lambda x: x[jnp.array([0, 1, 2, 3])], problem.tasks)
    weights = jnp.array([1.0, 2.0, 0.0, 0.0])  # on four devices, two have nothing to do
    learner = row.make(problem.loss_fn)
    meta_params = learner.init(problem.params)
    expected = jaxmaml.meta_grad(learner, meta_params, tasks, weights=weights)
    mesh = jax.make_mesh((num_devices,), ("tasks",), devices=jax.devices()[:num_devices])
    split, whole = PartitionSpec("tasks"), PartitionSpec()

    def on_a_device(params, tasks, weights):
        return jaxmaml.meta_grad(learner, params, tasks, weights=weights, axis_name="tasks")[:2]

    place = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    run = jax.shard_map(
        on_a_device, mesh=mesh, in_specs=(whole, split, split), out_specs=(whole, whole)
    )
    found = jax.jit(run)(place(meta_params, whole), place(tasks, split), place(weights, split))
    _assert_close(found, expected[:2], 2e-6)


@each_row
def test_number_of_traces_does_not_grow_with_steps(row):
    problem = smooth()
    learner, optimizer = row.make(problem.loss_fn), optax.adam(1e-3)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(meta_state, tasks):
        return jaxmaml.meta_step(learner, optimizer, meta_state, tasks)[0]

    chex.clear_trace_counter()
    meta_state = jaxmaml.init_state(learner, optimizer, problem.params)
    for _ in range(3):
        meta_state = step(meta_state, problem.tasks)
    assert int(meta_state.step) == 3


@each_row
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.usefixtures("x64")
def test_dtype_and_structure_are_preserved(row, dtype):
    problem = smooth(jnp.dtype(dtype))
    learner = row.make(problem.loss_fn)
    meta_params = learner.init(problem.params)
    loss, grads, _ = _meta_grad(row, problem, chunk_size=2)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, meta_params)
    assert loss.dtype == dtype
    task = jax.tree.map(lambda x: x[0], problem.tasks)
    adapted, _ = learner.adapt(meta_params, task.support)
    chex.assert_trees_all_equal_shapes_and_dtypes(adapted, problem.params)


@each_row
def test_float32_agrees_with_float64(row):
    low = _meta_grad(row, smooth())[1]
    with jax.enable_x64(True):
        high = _meta_grad(row, smooth(jnp.float64))[1]
    _assert_close(low, high, 1e-4)


@each_row
@pytest.mark.usefixtures("x64")
def test_what_the_loss_closes_over_is_differentiated(row):
    problem = smooth(jnp.float64)

    def meta_loss(scale):
        learner = row.make(lambda params, batch: scale * problem.loss_fn(params, batch))
        return jaxmaml.meta_grad(learner, learner.init(problem.params), problem.tasks)[0]

    if not row.is_derivative:
        pytest.skip("the first order leaves out how the inner gradients depend on anything")
    h = 1e-5
    difference = (meta_loss(1.0 + h) - meta_loss(1.0 - h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(meta_loss)(1.0), difference, rtol=1e-7)


@each_row
def test_trace_agrees_with_adapt_after_every_number_of_steps(row):
    problem = smooth()
    learner = row.make(problem.loss_fn)
    meta_params = learner.init(problem.params)
    task = jax.tree.map(lambda x: x[0], problem.tasks)
    views = learner.trace(meta_params, task.support, lambda adapted: adapted, num_inner_steps=4)
    for number in range(5):
        adapted, info = learner.adapt(meta_params, task.support, num_inner_steps=number)
        _assert_close(jax.tree.map(lambda x: x[number], views), adapted, 1e-6)  # noqa: B023
        assert info.inner_losses.shape == (number,)
