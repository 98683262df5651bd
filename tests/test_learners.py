"""The shared table: every learner is a row, every property a test over all rows."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparing import assert_close, flat
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec
from problems import conv4, quadratic, smooth

import jaxmaml
from jaxmaml.adjoints import Adjoint
from jaxmaml.inner import EXACT
from jaxmaml.learners import _template
from jaxmaml.types import MetaLearner

RATE = 0.1


class Row(NamedTuple):
    """A learner of the table.

    Attributes:
        make: `(problem, **options) -> MetaLearner`, where the options are an `adjoint` or nothing.
        closed_form: `(params, task of the quadratic problem) -> meta-gradient`, or None if there is
            no short one.
        is_derivative: whether the meta-gradient is the derivative of `learner.loss`.
        adjoint: what the learner is made with; None if it has no adjoint to choose.
        scores_last_step: whether what is differentiated is the query loss that is reported.
        needs: "nothing", a "head", or "no steps" for a learner that fills in its head at once.
    """

    make: Callable[..., MetaLearner]
    closed_form: Callable[..., Any] | None = None
    is_derivative: bool = True
    adjoint: Adjoint | None = EXACT
    needs: str = "nothing"
    scores_last_step: bool = True

    def learner(self, problem):
        """The learner on a problem."""
        options = {} if self.adjoint is None else {"adjoint": self.adjoint}
        return self.make(problem, **options)


def _sgd_closed_form(num_inner_steps, exact):
    """theta_n - c_s = (1 - RATE)^n (theta - c_s), so that its Jacobian is (1 - RATE)^n.

    `exact` may be a number of steps, the last ones; the steps before them have the Jacobian 1.
    """
    num_exact = num_inner_steps * exact if isinstance(exact, bool) else exact

    def gradient(params, task):
        return (1 - RATE) ** num_exact * _query_gradient(params, task, num_inner_steps)

    return gradient


def _query_gradient(params, task, num_inner_steps):
    center = task.support.mean(0)
    return center + (1 - RATE) ** num_inner_steps * (params - center) - task.query.mean(0)


def _multi_step_closed_form(params, task):
    """At outer step 0 of 3 inner steps: the mean of the query gradients after 1, 2 and 3."""
    steps = (1, 2, 3)
    return sum((1 - RATE) ** i * _query_gradient(params, task, i) for i in steps) / len(steps)


def _reptile_closed_form(params, task):
    center = jnp.concatenate([task.support, task.query]).mean(0)
    return (1 - (1 - RATE) ** 3) * (params - center)


def _meta_sgd_closed_form(params, task):
    """One step: phi = theta - r (theta - c_s) with a rate r for each number."""
    phi = _query_gradient(params, task, 1)
    return (1 - RATE) * phi, -phi * (params - task.support.mean(0))


def _imaml_closed_form(params, task):
    """phi = (c_s + l theta) / (1 + l) with l = 1."""
    return ((task.support.mean(0) + params) / 2 - task.query.mean(0)) / 2


def _joint_closed_form(params, task):
    return params - jnp.concatenate([task.support, task.query]).mean(0)


def _of(constructor, *args, needs_features=False, **options):
    """`(problem, **adjoint) -> learner`."""

    def make(problem, **more):
        features = {"features_fn": problem.features_fn} if needs_features else {}
        return constructor(problem.loss_fn, *args, **features, **options, **more)

    return make


def _maml(optimizer, num_inner_steps, **options):
    return _of(jaxmaml.maml, optimizer, num_inner_steps, **options)


_SGD = optax.sgd(RATE)
_ADAM = optax.adam(0.05, eps_root=1e-8)
ROWS = {
    "maml-0-steps": Row(_maml(_SGD, 0), _sgd_closed_form(0, True)),
    "maml-1-step": Row(_maml(_SGD, 1), _sgd_closed_form(1, True)),
    "maml-3-steps": Row(_maml(_SGD, 3), _sgd_closed_form(3, True)),
    "maml-10-steps": Row(_maml(_SGD, 10), _sgd_closed_form(10, True)),
    "maml-10-steps-in-segments": Row(
        _maml(_SGD, 10), _sgd_closed_form(10, True), adjoint=jaxmaml.Exact(checkpoint_every=3)
    ),
    "maml-momentum": Row(_maml(optax.sgd(RATE, momentum=0.9), 3)),
    "maml-adam": Row(_maml(_ADAM, 3)),
    "fomaml": Row(
        _of(jaxmaml.fomaml, _SGD, 3), _sgd_closed_form(3, False), is_derivative=False, adjoint=None
    ),
    "fomaml-adam": Row(_of(jaxmaml.fomaml, _ADAM, 3), is_derivative=False, adjoint=None),
    "fomaml-adam-in-segments": Row(
        _maml(_ADAM, 5), is_derivative=False, adjoint=jaxmaml.FirstOrder(checkpoint_every=2)
    ),
    "maml-last-2-steps-exact": Row(
        _maml(_SGD, 5), _sgd_closed_form(5, 2), is_derivative=False, adjoint=jaxmaml.Exact(last=2)
    ),
    "maml-exact-later": Row(
        _maml(_SGD, 3), _sgd_closed_form(3, False), is_derivative=False,
        adjoint=jaxmaml.Annealed(jaxmaml.FirstOrder(), jaxmaml.Exact(), at=1),
    ),
    "maml-multi-step-loss": Row(
        _maml(_SGD, 3, query_weights=jaxmaml.multi_step_weights(3, 100)),
        _multi_step_closed_form,
        scores_last_step=False,
    ),
    "maml-constant-query-weights": Row(
        _maml(_SGD, 3, query_weights=np.full(3, 1 / 3)),
        _multi_step_closed_form,
        scores_last_step=False,
    ),
    "maml++": Row(_of(jaxmaml.maml_plus_plus, 2, inner_lr=RATE), scores_last_step=False),
    "maml++-fixed-rates": Row(
        _of(jaxmaml.maml_plus_plus, 3, inner_lr=RATE, query_weights=None, learned_rates=False),
        _sgd_closed_form(3, True),
    ),
    "anil": Row(_of(jaxmaml.anil, _SGD, 3), needs="head"),
    "boil": Row(_of(jaxmaml.boil, _SGD, 3), needs="head"),
    "cavia": Row(_of(jaxmaml.cavia, _SGD, 3, context="a/bias"), needs="head"),
    "meta-sgd": Row(_of(jaxmaml.meta_sgd, 1, inner_lr=RATE), _meta_sgd_closed_form),
    "meta-sgd-layer-per-step": Row(
        _of(jaxmaml.meta_sgd, 3, inner_lr=RATE, granularity="layer", per_step=True)
    ),
    "meta-sgd-scalar": Row(_of(jaxmaml.meta_sgd, 2, inner_lr=RATE, granularity="scalar")),
    "learned-momentum": Row(
        _maml(
            jaxmaml.learned_optimizer(
                lambda h: optax.sgd(h["lr"], momentum=h["momentum"]), {"lr": RATE, "momentum": 0.9}
            ),
            3,
        )
    ),
    "meta-curvature": Row(_of(jaxmaml.meta_curvature, _SGD, 2)),
    "reptile": Row(_of(jaxmaml.reptile, _SGD, 3), _reptile_closed_form,
        is_derivative=False, adjoint=None, scores_last_step=False,
    ),
    "imaml": Row(
        _of(jaxmaml.imaml, optax.sgd(0.45), 100, num_cg_steps=50, cg_tol=1e-12),
        _imaml_closed_form,
        adjoint=None,
    ),
    "fine-tuning": Row(
        _of(jaxmaml.fine_tuning, _SGD, 3), _joint_closed_form, adjoint=None
    ),
    "protonet": Row(_of(jaxmaml.protonet, needs_features=True), adjoint=None, needs="no steps"),
    "r2d2": Row(_of(jaxmaml.r2d2, needs_features=True), adjoint=None, needs="no steps"),
    "proto-maml": Row(_of(jaxmaml.proto_maml, _SGD, 3, needs_features=True), needs="head"),
    "template": Row(_of(_template.template, _SGD, 3), _sgd_closed_form(3, True)),
    "unicorn": Row(_of(jaxmaml.unicorn, _SGD, 3), needs="head"),
    "unicorn-learned-rates": Row(
        _of(jaxmaml.unicorn, jaxmaml.learned_sgd(RATE, granularity="layer"), 2), needs="head"
    ),
    "cavia-learned-rates": Row(
        _of(jaxmaml.cavia, jaxmaml.learned_sgd(RATE), 2, context="a/bias"), needs="head"
    ),
}  # fmt: skip
MOST_USED = ROWS["maml-3-steps"]

# Further rows of a learner that has one already: `-m slow` runs them.
FURTHER = {
    *("maml-10-steps", "maml-10-steps-in-segments", "maml-momentum", "maml-constant-query-weights"),
    *("fomaml-adam", "fomaml-adam-in-segments", "maml++-fixed-rates", "meta-sgd-layer-per-step"),
    *("meta-sgd-scalar", "unicorn-learned-rates", "cavia-learned-rates"),
}
# What tasks, devices and compilation do to a learner depends on how its step is made, not on its rule.
# These rows make it in each way: by scan, with a schedule, with statistics, without steps, implicitly.
EACH_WAY = {
    *("maml-1-step", "maml-3-steps", "maml-multi-step-loss", "maml-exact-later", "maml++"),
    *("cavia", "meta-curvature", "reptile", "imaml", "r2d2", "proto-maml"),
}


def _rows(is_slow):
    """Parametrizes a test by all rows; those whose name `is_slow` run with `-m slow`."""
    return pytest.mark.parametrize(
        "row",
        [
            pytest.param(row, id=name, marks=[pytest.mark.slow] * is_slow(name))
            for name, row in ROWS.items()
        ],
    )


each_row = _rows(lambda name: name in FURTHER)
each_way = _rows(lambda name: name not in EACH_WAY)
each_mode = _rows(lambda name: name not in EACH_WAY | {"maml-adam", "maml-last-2-steps-exact"})


@functools.cache
def _program(row, problem, dtype, chunk_size=None):
    """(meta-parameters, tasks, compiled `meta_grad` of them): shared by the tests of a row."""
    problem = problem(dtype)
    learner = row.learner(problem)
    run = jax.jit(functools.partial(jaxmaml.meta_grad, learner, chunk_size=chunk_size))
    return learner.init(problem.params), problem.tasks, run


def _meta_grad(row, problem, dtype, chunk_size=None):
    meta_params, tasks, run = _program(row, problem, dtype, chunk_size)
    return run(meta_params, tasks)


@each_row
@pytest.mark.usefixtures("x64")
def test_closed_form_on_a_quadratic(row):
    if row.closed_form is None:
        pytest.skip("no short closed form")
    problem = quadratic(jnp.float64)
    expected = jax.vmap(row.closed_form, (None, 0))(problem.params, problem.tasks)
    expected = jax.tree.map(lambda leaf: leaf.mean(0), expected)
    found = _meta_grad(row, quadratic, jnp.float64)[1]
    assert_close(flat(found), flat(expected), 1e-13)


def _central_difference(row, problem, h):
    """(derivative of the meta-loss along a random direction, the same from its gradient)."""
    meta_params, tasks, run = _program(row, problem, jnp.float64)
    start, unravel = ravel_pytree(meta_params)
    along = np.random.default_rng(1).normal(size=start.shape)
    loss = lambda shift: run(unravel(start + shift * along), tasks)[0]
    return (loss(h) - loss(-h)) / (2 * h), flat(run(meta_params, tasks)[1]) @ along


@each_row
@pytest.mark.parametrize("problem", [smooth, pytest.param(quadratic, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("x64")
def test_central_differences(row, problem):
    if not row.is_derivative:
        pytest.skip("the meta-gradient is not the derivative of the loss, by definition")
    if problem is quadratic and row.needs != "nothing":
        pytest.skip("the quadratic has no head")
    # A root under Adam bends within 1e-4: the truncation at h = 1e-6 would show.
    difference, derivative = _central_difference(row, problem, 3e-7)
    np.testing.assert_allclose(derivative, difference, rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_central_differences_of_a_network_with_kinks():
    difference, derivative = _central_difference(ROWS["maml-3-steps"], conv4, 1e-7)
    np.testing.assert_allclose(derivative, difference, rtol=1e-6)


@each_mode
@pytest.mark.usefixtures("x64")
def test_every_mode_gives_the_same(row):
    _assert_modes_agree(row, smooth, "forward_over_reverse")


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_every_mode_gives_the_same_on_a_convolutional_network():
    _assert_modes_agree(ROWS["maml-3-steps"], conv4, "forward_over_reverse", "checkpoint")


@each_way
@pytest.mark.usefixtures("x64")
def test_recomputing_gives_the_same(row):
    _assert_modes_agree(row, smooth, "checkpoint")


def _assert_modes_agree(row, problem, *modes):
    if not isinstance(row.adjoint, jaxmaml.Exact):
        pytest.skip("has no exact adjoint to choose a mode of")
    expected = _meta_grad(_in_mode(row, "reverse"), problem, jnp.float64)[1]
    for mode in modes:
        assert_close(_meta_grad(_in_mode(row, mode), problem, jnp.float64)[1], expected, 1e-10)


def _in_mode(row, mode):
    return row._replace(adjoint=dataclasses.replace(row.adjoint, mode=mode))


@each_way
def test_vmap_equals_a_loop_and_every_chunk_size_agrees(row):
    problem = smooth()
    learner = row.learner(problem)
    meta_params, grad = learner.init(problem.params), jax.jit(jax.grad(learner.loss, has_aux=True))
    task = lambda i: jax.tree.map(lambda leaf: leaf[i], problem.tasks)
    one_by_one = [grad(meta_params, task(i))[0] for i in range(4)]
    expected = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *one_by_one)
    for chunk_size in (1, 2, 3, 7) if row is MOST_USED else (3,):
        loss, grads, info = _meta_grad(row, smooth, jnp.float32, chunk_size)
        assert_close(grads, expected, 2e-5)
        assert info.query_loss.shape == (4,)
        if row.scores_last_step:
            np.testing.assert_allclose(loss, info.query_loss.mean(), rtol=1e-5)


@each_way
@pytest.mark.parametrize(
    "num_devices",
    [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3],
)
def test_every_device_count_gives_the_same_gradient(row, num_devices):
    meta_params, tasks, _ = _program(row, smooth, jnp.float32, 3)
    expected = _meta_grad(row, smooth, jnp.float32, 3)[:2]
    # Four tasks and two without weight, which three devices divide evenly.
    weights = jnp.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    tasks = jax.tree.map(lambda leaf: leaf[jnp.array([0, 1, 2, 3, 0, 0])], tasks)
    found = _on_devices(num_devices, row.learner(smooth()), meta_params, tasks, weights)
    assert_close(found, expected, 2e-5)


def test_devices_without_a_task_that_counts_have_no_part():
    problem = smooth()
    weights = jnp.array([1.0, 2.0, 0.0, 0.0])
    learner = MOST_USED.learner(problem)
    run = jax.jit(lambda *args: jaxmaml.meta_grad(learner, *args, weights=weights)[:2])
    expected = run(problem.params, problem.tasks)
    assert_close(_on_devices(4, learner, problem.params, problem.tasks, weights), expected, 2e-6)


def _on_devices(num_devices, learner, params, tasks, weights=None):
    mesh = jax.make_mesh((num_devices,), ("tasks",), devices=jax.devices()[:num_devices])
    whole, shared = PartitionSpec(), PartitionSpec("tasks")

    def on_a_device(params, tasks, weights):
        return jaxmaml.meta_grad(learner, params, tasks, weights=weights, axis_name="tasks")[:2]

    run = jax.shard_map(
        on_a_device,
        mesh=mesh, in_specs=(whole, shared, shared), out_specs=whole, check_vma=False,
    )  # fmt: skip
    place = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    return jax.jit(run)(place(params, whole), place(tasks, shared), place(weights, shared))


@each_way
def test_number_of_traces_does_not_grow_with_steps(row):
    problem = smooth()
    learner, optimizer = row.learner(problem), optax.adam(1e-3)

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
@pytest.mark.parametrize(
    "dtype",
    # A value that is promoted shows at the narrowest type already.
    ["bfloat16", *(pytest.param(wide, marks=pytest.mark.slow) for wide in ("float32", "float64"))],
)
@pytest.mark.usefixtures("x64")
def test_dtype_and_structure_are_preserved(row, dtype):
    problem = smooth(jnp.dtype(dtype))
    learner, optimizer = row.learner(problem), optax.sgd(0.1, momentum=0.9)
    # Shapes are enough: nothing is compiled.
    init = functools.partial(jaxmaml.init_state, learner, optimizer)
    meta_state = jax.eval_shape(init, problem.params)
    stepped, metrics = jax.eval_shape(
        functools.partial(jaxmaml.meta_step, learner, optimizer, chunk_size=2),
        meta_state, problem.tasks,
    )  # fmt: skip
    chex.assert_trees_all_equal_shapes_and_dtypes(stepped, meta_state)
    # Else the second step would be compiled again.
    is_weak = lambda tree: [leaf.weak_type for leaf in jax.tree.leaves(tree)]
    assert is_weak(stepped) == is_weak(meta_state)
    assert metrics["loss"].dtype == dtype
    task = jax.tree.map(lambda leaf: leaf[0], problem.tasks)
    adapted, _ = jax.eval_shape(learner.adapt, meta_state.params, task.support)
    chex.assert_trees_all_equal_shapes_and_dtypes(adapted, problem.params)


@each_row
def test_float32_agrees_with_float64(row):
    low = _meta_grad(row, smooth, jnp.float32, 3)[1]
    with jax.enable_x64(True):
        high = _meta_grad(row, smooth, jnp.float64)[1]
    assert_close(low, high, 1e-4)


def _loss(learner, meta_params, tasks):
    return jnp.mean(jax.vmap(learner.loss, (None, 0))(meta_params, tasks)[0])


@each_way
@pytest.mark.usefixtures("x64")
def test_what_the_loss_closes_over_is_differentiated(row):
    _assert_scale_is_differentiated(row, _loss)


@pytest.mark.slow
@each_row
@pytest.mark.usefixtures("x64")
def test_what_the_loss_closes_over_is_differentiated_through_meta_grad(row):
    _assert_scale_is_differentiated(row, lambda *args: jaxmaml.meta_grad(*args)[0])


@pytest.mark.usefixtures("x64")
def test_meta_grad_is_differentiated():
    """The cheap sibling of the test before it."""
    meta_loss = lambda *args: jaxmaml.meta_grad(*args)[0]
    _assert_scale_is_differentiated(ROWS["maml-1-step"], meta_loss)


def _assert_scale_is_differentiated(row, loss_of):
    """Compares the derivative of the meta-loss by a factor of the task loss with differences."""
    problem = smooth(jnp.float64)

    def meta_loss(scale):
        scaled = lambda params, batch: scale * problem.loss_fn(params, batch)
        learner = row.learner(problem._replace(loss_fn=scaled))
        return loss_of(learner, learner.init(problem.params), problem.tasks)

    if not row.is_derivative:
        pytest.skip("the first order leaves out how the inner gradients depend on anything")
    run, h = jax.jit(jax.value_and_grad(meta_loss)), 1e-5
    difference = (run(1.0 + h)[0] - run(1.0 - h)[0]) / (2 * h)
    np.testing.assert_allclose(run(1.0)[1], difference, rtol=1e-7)


@each_way
def test_trace_agrees_with_adapt_after_every_number_of_steps(row):
    problem = smooth()
    learner = row.learner(problem)
    meta_params = learner.init(problem.params)
    task = jax.tree.map(lambda x: x[0], problem.tasks)
    last = 0 if row.needs == "no steps" else 3
    views = _jitted(learner.trace, lambda adapted, state: adapted, last)(meta_params, task.support)
    for number in sorted({0, last}):
        adapted, info = _jitted(learner.adapt, None, number)(meta_params, task.support)
        assert_close(jax.tree.map(lambda x: x[number], views), adapted, 1e-6)  # noqa: B023
        assert info.inner_losses.shape == (number,)


def _jitted(function, view, number):
    views = () if view is None else (view,)
    return jax.jit(lambda *args: function(*args, *views, num_inner_steps=number))
