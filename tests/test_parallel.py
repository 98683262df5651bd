"""Tasks over devices: the same results as on one, and the errors a user meets."""

import importlib
import itertools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparing import assert_close
from flax import nnx
from jax.sharding import AxisType
from problems import smooth
from test_processes import start

import jaxmaml
from jaxmaml import nn, parallel

PROBLEM = smooth()
LEARNER = jaxmaml.maml(PROBLEM.loss_fn, optax.sgd(0.1), 2)
OPTIMIZER = optax.sgd(0.1)
TASKS = PROBLEM.tasks


@pytest.mark.parametrize("weights", [None, np.array([1.0, 0.0, 2.0, 3.0])])
def test_meta_step_is_that_of_one_device(weights):
    meta_state = jaxmaml.init_state(LEARNER, OPTIMIZER, PROBLEM.params)
    expected, metrics = jaxmaml.meta_step(LEARNER, OPTIMIZER, meta_state, TASKS, weights=weights)
    mesh = parallel.make_mesh(4)
    found, spread = jax.jit(
        lambda state, tasks: jaxmaml.meta_step(
            LEARNER, OPTIMIZER, state, tasks, mesh=mesh, weights=weights
        )
    )(parallel.place(meta_state, mesh), TASKS)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )
    for name, value in metrics.items():
        np.testing.assert_allclose(spread[name], value, rtol=1e-5)


def test_evaluate_is_that_of_one_device():
    meta_state = jaxmaml.init_state(LEARNER, OPTIMIZER, PROBLEM.params)
    expected = jaxmaml.evaluate(LEARNER, PROBLEM.loss_fn, meta_state, TASKS)
    mesh = parallel.make_mesh(4)
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
        for mesh in (None, parallel.make_mesh(4))
    ]
    np.testing.assert_allclose(finals[1].params, finals[0].params, rtol=1e-6)


def test_the_tasks_are_spread_over_their_own_axis_of_a_mesh():
    axes = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((2, 2), ("tasks", "model"), axis_types=axes)
    meta_state = jaxmaml.init_state(LEARNER, OPTIMIZER, PROBLEM.params)
    tasks = jax.tree.map(lambda leaf: leaf[:2], TASKS)
    expected, _ = jaxmaml.meta_step(LEARNER, OPTIMIZER, meta_state, tasks)
    found, _ = jax.jit(
        lambda state, tasks: jaxmaml.meta_step(LEARNER, OPTIMIZER, state, tasks, mesh=mesh)
    )(meta_state, tasks)
    assert_close(found.params, expected.params, 1e-5)


AXES = ((), ("tasks",), ("model",), ("tasks", "model"))
FAST_SPLITS = {((), 3), (("tasks",), 3), (("tasks",), 4), (("model",), 1), (("tasks", "model"), 3)}
"""Two devices share the tasks: only their being even or not matters."""


@pytest.mark.parametrize(
    ("axes", "num_tasks"),
    [
        pytest.param(*case, marks=() if case in FAST_SPLITS else pytest.mark.slow)
        for case in itertools.product(AXES, (1, 2, 3, 4))
    ],
)
def test_split_parameters_are_trained_as_whole_ones(axes, num_tasks, x64):
    # Clipping needs the norm over all parts.
    problem = smooth(jnp.float64)
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2))
    learner = jaxmaml.maml(problem.loss_fn, optax.sgd(0.1), 2)
    tasks = jax.tree.map(lambda leaf: leaf[:num_tasks], problem.tasks)
    start = jaxmaml.init_state(learner, optimizer, problem.params)
    mesh = parallel.make_mesh(2, 2)
    placed = parallel.place(start, mesh, parallel.split_specs(start, mesh, axes))
    alone, spread = (
        list(jaxmaml.fit(learner, optimizer, state, [tasks] * 5, 5, mesh=used))[-1]
        for state, used in ((start, None), (placed, mesh))
    )
    assert_close(parallel.to_host(spread[0].params), alone[0].params, 1e-12)
    for name, rows in alone[1].items():
        np.testing.assert_allclose(spread[1][name], rows, rtol=1e-12)
    # What was split stays so, optimizer state included.
    assert parallel.specs_of(spread[0], mesh) == parallel.specs_of(placed, mesh)


def test_split_parameters_are_evaluated_as_whole_ones():
    start = jaxmaml.init_state(LEARNER, OPTIMIZER, PROBLEM.params)
    mesh = parallel.make_mesh(4)
    placed = parallel.place(start, mesh, parallel.split_specs(start, mesh))
    source = lambda key: TASKS
    options = {"num_tasks": 4, "key": jax.random.key(0)}
    found, expected = (
        jaxmaml.evaluate(LEARNER, PROBLEM.loss_fn, state, source, mesh=used, **options)
        for state, used in ((placed, mesh), (start, None))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tasks": 5}, "a mesh of tasks=5 and model=1 needs 5 devices; there are 4"),
        ({"tasks": 2, "model": 3}, "a mesh of tasks=2 and model=3 needs 6 devices; there are 4"),
        ({"tasks": 0}, "tasks must be an integer, 1 or more"),
        ({"model": 8}, "needs 8 devices; there are 4"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        parallel.make_mesh(**sizes)


def test_an_axis_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="the mesh has the axes tasks; got 'data'"):
        parallel.split_specs(PROBLEM.params, parallel.make_mesh(2), ("data",))


def _matching(learner, optimizer, meta_state, tasks, num_devices):
    """Checks that one step over a mesh is that of one device; returns the state after it."""
    mesh = parallel.make_mesh(num_devices)
    step = lambda state, tasks: jaxmaml.meta_step(learner, optimizer, state, tasks, mesh=mesh)
    found, _ = jax.jit(step)(parallel.place(meta_state, mesh), tasks)
    alone = lambda state, tasks: jaxmaml.meta_step(learner, optimizer, state, tasks)
    expected, _ = jax.jit(alone)(meta_state, tasks)
    assert_close(found.params, expected.params, 1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        (found.state, found.step), (expected.state, expected.step),
    )  # fmt: skip
    return found


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.apply_if_finite(optax.sgd(1e-2), 3),
        pytest.param(
            optax.chain(optax.sgd(1e-2), optax.contrib.reduce_on_plateau()), marks=pytest.mark.slow
        ),
        pytest.param(
            optax.MultiSteps(optax.sgd(1e-2), 2).gradient_transformation(), marks=pytest.mark.slow
        ),
    ],
    ids=["apply_if_finite", "reduce_on_plateau", "multi_steps"],
)
def test_any_optimizer_with_counters_runs_over_a_mesh(optimizer):
    learner = jaxmaml.maml(PROBLEM.loss_fn, optimizer, 2)
    meta_state = jaxmaml.init_state(learner, optimizer, PROBLEM.params)
    _matching(learner, optimizer, meta_state, TASKS, 2)


def test_a_loss_that_scans_from_a_constant_runs_over_a_mesh():
    # As a recurrent network does, whose first state is zeros.
    def loss_fn(params, batch):
        last, _ = jax.lax.scan(
            lambda carry, row: (jnp.tanh(carry + row @ params["a"]["kernel"]), None),
            jnp.zeros(8), batch["inputs"],
        )  # fmt: skip
        return jnp.mean((last @ params["head"]["kernel"]) ** 2)

    learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), 2)
    _matching(learner, OPTIMIZER, jaxmaml.init_state(learner, OPTIMIZER, PROBLEM.params), TASKS, 2)


def test_counters_and_keys_of_a_state_are_those_of_a_device_whose_tasks_count():
    @jaxmaml.with_state
    def loss_fn(params, batch, state):
        loss = PROBLEM.loss_fn(params, batch)
        total = state["total"] + jnp.sum(batch["targets"])  # differs between tasks
        key = jax.random.fold_in(state["key"], jnp.sum(batch["targets"]))
        return loss, {"count": state["count"] + 1, "total": total, "key": key, "loss": loss}

    state = {
        "count": jnp.array(0), "total": jnp.array(0), "key": jax.random.key(0), "loss": jnp.zeros(()),
    }  # fmt: skip
    targets = jnp.arange(4)[:, None] % 3 * jnp.ones((4, 6), jnp.int32)
    tasks = jax.tree.map(lambda batch: batch, TASKS)
    tasks.support["targets"], tasks.query["targets"] = targets, targets
    learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), 2)
    mesh = parallel.make_mesh(2)
    weights = jnp.array([0.0, 0.0, 1.0, 1.0])
    step = lambda meta_state, tasks: jaxmaml.meta_step(
        learner, OPTIMIZER, meta_state, tasks, mesh=mesh, weights=weights
    )
    meta_state = jaxmaml.init_state(learner, OPTIMIZER, PROBLEM.params, state)
    after, _ = jax.jit(step)(parallel.place(meta_state, mesh), tasks)
    # Three passes over the third task, whose six targets are 2.
    assert int(after.state["count"]) == 3
    assert int(after.state["total"]) == 3 * 6 * 2
    expected = jax.random.key(0)
    for _ in range(3):
        expected = jax.random.fold_in(expected, 12)
    assert bool(after.state["key"] == expected)
    shards = after.state["total"].addressable_shards
    assert {int(shard.data) for shard in shards} == {36}


def test_normalization_per_step_runs_over_a_mesh():
    model = nn.from_nnx_with_state(
        nn.MLP(4, 3, hidden=(5,), norm="per_step", num_steps=2, rngs=nnx.Rngs(0))
    )
    learner = jaxmaml.maml_plus_plus(
        nn.cross_entropy(model.train_fn), 2, inner_lr=0.1, query_weights=None
    )
    meta_state = jaxmaml.init_state(learner, OPTIMIZER, model.params, model.state)
    after = _matching(learner, OPTIMIZER, meta_state, TASKS, 2)
    assert {leaf.dtype.kind for leaf in jax.tree.leaves(after.state)} >= {"f", "i"}


BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
scaling = importlib.import_module("scaling")


def _compiled(layout, num_devices):
    """Returns the row of `scaling.py` about a small Conv4."""
    if num_devices <= jax.device_count():
        return scaling.compiled_row(scaling.WORKS["conv4"](True), num_devices, layout)
    case = {"work": "conv4", "layout": layout, "num_devices": num_devices}
    process = start([BENCHMARKS / "scaling.py"], "--quick", "--child", json.dumps(case))
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize(
    "num_devices", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (8, 256))]
)
def test_an_outer_step_is_one_all_reduce_on_any_number_of_devices(num_devices):
    row = _compiled("replicated", num_devices)
    assert row["collectives"] == {"all-reduce": 1}
    # The gradient, and three more numbers: the weight, the loss and the query loss.
    assert row["sent_mib"] * 2**20 == row["params_mib"] * 2**20 + 3 * 4
    assert row["num_host_transfers"] == 0


def test_split_state_is_divided_by_the_number_of_devices():
    one, four = _compiled("sharded", 1), _compiled("sharded", 4)
    assert set(four["collectives"]) == {"all-gather", "reduce-scatter"}
    assert four["num_host_transfers"] == 0
    # Only the last bias, of five numbers, and counters are held by all devices.
    whole = 3 * 5 * 4 + 8
    assert four["state_bytes"] <= (one["state_bytes"] - whole) / 4 + whole
    tasks = one["argument_bytes"] - one["state_bytes"]
    assert abs(four["argument_bytes"] - four["state_bytes"] - tasks) <= 64


def test_keys_on_the_host_stay_keys():
    keys = jax.random.split(jax.random.key(0), 2)
    found = parallel.to_host(parallel.place({"key": keys, "x": jnp.ones(2)}, parallel.make_mesh(2)))
    np.testing.assert_array_equal(jax.random.key_data(found["key"]), jax.random.key_data(keys))
    assert isinstance(found["x"], np.ndarray)
