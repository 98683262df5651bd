"""Batching over tasks: weights, state, evaluation and the errors a user meets."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from problems import smooth

import jaxmaml
from jaxmaml import parallel

LOSS = lambda params, batch: jnp.mean((params - batch) ** 2) / 2
LEARNER = jaxmaml.maml(LOSS, optax.sgd(0.5), 1)
START = jaxmaml.init_state(LEARNER, optax.sgd(0.1), jnp.array(0.0))


def _tasks(*values):
    rows = jnp.array(values)[:, None] * jnp.ones((1, 2))
    return jaxmaml.Task(rows, rows)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("jit", [True, False])
def test_weights_are_a_weighted_mean_and_zero_hides_anything(chunk_size, jit):
    def run(tasks, weights):
        return jaxmaml.meta_grad(
            LEARNER, jnp.array(0.0), tasks, weights=weights, chunk_size=chunk_size
        )

    run = jax.jit(run) if jit else run
    loss, grad, info = run(_tasks(1.0, jnp.nan, 3.0), jnp.array([3.0, 0.0, 1.0]))
    # Loss of a task at c: (c/2)²/2, gradient (0.5) (-c/2).
    np.testing.assert_allclose(loss, (3 * 1 / 8 + 9 / 8) / 4, rtol=1e-6)
    np.testing.assert_allclose(grad, -(3 * 1 + 3) / 4 / 4, rtol=1e-6)
    assert np.isfinite(info.query_loss).all()


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_state_is_averaged_over_tasks_from_step_to_step(chunk_size):
    @jaxmaml.with_state
    def loss(params, batch, state):
        state = {"mean": 0.9 * state["mean"] + 0.1 * batch.mean(), "count": state["count"] + 1}
        return LOSS(params, batch), state

    learner = jaxmaml.maml(loss, optax.sgd(0.5), 1)
    start = {"mean": jnp.array(0.0), "count": jnp.array(0)}
    optimizer = optax.sgd(0.1)
    meta_state = jaxmaml.init_state(learner, optimizer, jnp.array(0.0), start)
    for number in (1, 2):
        meta_state, _ = jaxmaml.meta_step(
            learner, optimizer, meta_state, _tasks(1.0, 2.0, 6.0), chunk_size=chunk_size
        )
        assert int(meta_state.state["count"]) == 2 * number  # one support and one query pass
    np.testing.assert_allclose(meta_state.state["mean"], 3 * (1 - 0.9**4), rtol=1e-6)


def test_meta_step_is_the_optimizer_on_the_meta_gradient():
    problem = smooth()
    learner, optimizer = jaxmaml.maml(problem.loss_fn, optax.sgd(0.1), 2), optax.adam(1e-2)
    meta_state = jaxmaml.init_state(learner, optimizer, problem.params)
    loss, grads, _ = jaxmaml.meta_grad(learner, problem.params, problem.tasks)
    updates, _ = optimizer.update(grads, optimizer.init(problem.params), problem.params)
    stepped, metrics = jaxmaml.meta_step(learner, optimizer, meta_state, problem.tasks)
    expected = optax.apply_updates(problem.params, updates)
    jax.tree.map(np.testing.assert_array_equal, stepped.params, expected)
    np.testing.assert_allclose(metrics["loss"], loss)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads))


def test_query_loss_scores_the_query():
    learner = jaxmaml.maml(LOSS, optax.sgd(0.5), 1, query_loss_fn=lambda params, batch: params)
    loss, grad, _ = jaxmaml.meta_grad(learner, jnp.array(0.0), _tasks(1.0, 3.0))
    np.testing.assert_allclose([loss, grad], [1.0, 0.5])


@pytest.mark.parametrize("chunk_size", ["auto", None, 2, 3, 100])
def test_evaluate_gives_every_task_after_every_step(chunk_size):
    metric = lambda adapted, query: jnp.abs(adapted - query[0])
    tasks = _tasks(1.0, 2.0, 4.0)
    found = jaxmaml.evaluate(
        LEARNER, metric, START, tasks, num_inner_steps=2, chunk_size=chunk_size
    )
    np.testing.assert_allclose(found, np.outer([1, 2, 4], [1, 0.5, 0.25]))
    assert jaxmaml.evaluate(LEARNER, metric, START, _tasks(1.0, 2.0)).shape == (2, 2)


def test_evaluate_hands_the_state_to_the_metric():
    loss = jaxmaml.with_state(lambda params, batch, state: (LOSS(params, batch), state + 1))
    learner = jaxmaml.maml(loss, optax.sgd(0.5), 1)
    metric = jaxmaml.with_state(lambda adapted, query, state: (state, state))
    meta_state = START._replace(state=jnp.array(5))
    found = jaxmaml.evaluate(learner, metric, meta_state, _tasks(1.0, 2.0))
    np.testing.assert_array_equal(found, [[5, 6], [5, 6]])


def test_memory_of_evaluation_does_not_grow_with_the_number_of_tasks():
    problem = smooth()
    learner = jaxmaml.maml(problem.loss_fn, optax.sgd(0.1), 2)

    def temp_bytes(num_tasks):
        tasks = jax.tree.map(lambda x: jnp.repeat(x[:1], num_tasks, axis=0), problem.tasks)
        run = lambda meta_state, tasks: jaxmaml.evaluate(
            learner, problem.loss_fn, meta_state, tasks, chunk_size=4
        )
        meta_state = jaxmaml.init_state(learner, optax.sgd(0.1), problem.params)
        compiled = jax.jit(run).lower(meta_state, tasks).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temp_bytes(400) < temp_bytes(40) + 400 * 3 * 4 + 1024


@pytest.mark.parametrize(
    ("tasks", "error", "message"),
    [
        (jaxmaml.Task(jnp.zeros((3, 2)), jnp.zeros((4, 2))), ValueError, "support: 3, query: 4"),
        (jaxmaml.Task(jnp.zeros((0, 2)), jnp.zeros((0, 2))), ValueError, "positive size"),
        (
            jaxmaml.Task({"x": jnp.zeros((2, 2)), "n": jnp.array(1)}, jnp.zeros((2, 2))),
            ValueError,
            "n: None",
        ),
        ((jnp.zeros((3, 2)), jnp.zeros((3, 2))), TypeError, "must be a Task"),
    ],
)
def test_wrong_tasks_are_refused(tasks, error, message):
    with pytest.raises(error, match=message):
        jaxmaml.meta_grad(LEARNER, jnp.array(0.0), tasks)
    if isinstance(tasks, jaxmaml.Task):
        with pytest.raises(error, match=message):
            jaxmaml.evaluate(LEARNER, LOSS, START, tasks)


@pytest.mark.parametrize(
    "loss",
    [lambda params, batch: batch, lambda params, batch: jnp.array(1)],
    ids=["vector", "integer"],
)
def test_a_query_loss_that_is_not_a_float_scalar_is_refused(loss):
    learner = jaxmaml.maml(LOSS, optax.sgd(0.5), 1, query_loss_fn=loss)
    with pytest.raises(TypeError, match="floating-point scalar"):
        jaxmaml.meta_grad(learner, jnp.array(0.0), _tasks(1.0, 2.0))


def test_sharded_meta_gradient_is_one_all_reduce():
    from jax.sharding import NamedSharding, PartitionSpec

    problem = smooth()
    learner = jaxmaml.maml(problem.loss_fn, optax.sgd(0.1), 2)
    tasks = jax.tree.map(lambda x: x[:4], problem.tasks)
    mesh = jax.make_mesh((4,), ("tasks",))
    split, whole = PartitionSpec("tasks"), PartitionSpec()
    run = jax.shard_map(
        lambda params, tasks: jaxmaml.meta_grad(learner, params, tasks, axis_name="tasks")[:2],
        mesh=mesh, in_specs=(whole, split), out_specs=whole,
    )  # fmt: skip
    params = jax.device_put(problem.params, NamedSharding(mesh, whole))
    tasks = jax.device_put(tasks, NamedSharding(mesh, split))
    text = jax.jit(run).lower(params, tasks).compile().as_text()
    collectives = (
        "all-reduce(",
        "all-gather(",
        "all-to-all(",
        "collective-permute(",
        "reduce-scatter(",
    )
    assert text is not None
    assert [text.count(name) for name in collectives] == [1, 0, 0, 0, 0]


def _source(key):
    rows = jax.random.normal(key, (4, 1)) * jnp.ones((1, 2))
    return jaxmaml.Task(rows, rows)


def _streamed():
    key = jax.random.key(0)
    return [_source(jax.random.fold_in(key, step)) for step in range(3)]


@pytest.mark.parametrize("num_devices", [None, 1, 4])
@pytest.mark.parametrize("kind", ["function", "iterable"])
def test_evaluate_reads_as_many_tasks_of_a_source_as_it_is_asked_for(kind, num_devices):
    metric = lambda adapted, query: jnp.abs(adapted - query[0])
    mesh = None
    if num_devices:
        mesh = parallel.make_mesh(num_devices)
    source, key = (_source, jax.random.key(0)) if kind == "function" else (_streamed(), None)
    found = jaxmaml.evaluate(LEARNER, metric, START, source, num_tasks=10, key=key, mesh=mesh)
    centers = np.concatenate([tasks.query[:, 0] for tasks in _streamed()])[:10]
    np.testing.assert_allclose(found, np.outer(np.abs(centers), [1, 0.5]), rtol=1e-6)


def test_evaluate_scores_all_tasks_of_an_iterable():
    assert jaxmaml.evaluate(LEARNER, LOSS, START, _streamed()).shape == (12, 2)


def test_evaluate_compiles_once_for_a_source():
    traces = []

    def metric(adapted, query):
        traces.append(1)
        return jnp.abs(adapted - query[0])

    learner = jaxmaml.maml(LOSS, optax.sgd(0.5), 1)
    score = lambda seed: jaxmaml.evaluate(
        learner, metric, START, _source, num_tasks=8, key=jax.random.key(seed)
    )
    score(0)
    num_traces = len(traces)
    score(1)
    assert len(traces) == num_traces > 0


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (_source, {"key": jax.random.key(0)}, "num_tasks must be given"),
        (_source, {"num_tasks": 4}, "key must be given"),
        (_streamed(), {"num_tasks": 13}, "the source ended after 12 tasks; num_tasks=13"),
        (_tasks(1.0), {"num_tasks": 1}, "num_tasks and key are for a source"),
        ([], {}, "the source ended after 0 tasks"),
        (_source, {"num_tasks": 0, "key": jax.random.key(0)}, "num_tasks must be an integer, 1"),
    ],
)
def test_wrong_options_of_a_source_are_refused(source, options, message):
    with pytest.raises(ValueError, match=message):
        jaxmaml.evaluate(LEARNER, LOSS, START, source, **options)


def test_tasks_that_the_mesh_does_not_divide_are_scored_too():
    tasks = _tasks(1.0, 2.0, 3.0)
    expected = jaxmaml.evaluate(LEARNER, LOSS, START, tasks)
    found = jaxmaml.evaluate(LEARNER, LOSS, START, tasks, mesh=parallel.make_mesh(2))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,)), "no axis 'tasks'.*data"),
        (jax.make_mesh((2,), ("tasks",), axis_types=(AxisType.Explicit,)), "axis types Auto"),
    ],
)
def test_a_mesh_of_another_kind_is_refused(mesh, message):
    with pytest.raises(ValueError, match=message):
        jaxmaml.evaluate(LEARNER, LOSS, START, _tasks(1.0, 2.0), mesh=mesh)
    with pytest.raises(ValueError, match=message):
        jaxmaml.meta_grad(LEARNER, jnp.array(0.0), _tasks(1.0, 2.0), mesh=mesh)
    source = [_tasks(1.0, 2.0)]
    with pytest.raises(ValueError, match=message):
        jaxmaml.fit(LEARNER, optax.sgd(0.1), START, source, 1, mesh=mesh)


@pytest.mark.parametrize("num_inner_steps", [0, 1, 2])
def test_a_state_of_another_structure_is_refused(num_inner_steps):
    loss = jaxmaml.with_state(lambda params, batch, state: (LOSS(params, batch), {"mean": params}))
    learner = jaxmaml.maml(loss, optax.sgd(0.5), num_inner_steps)
    with pytest.raises(ValueError, match=r"state of (another structure|the structure and types)"):
        jaxmaml.meta_grad(learner, jnp.array(0.0), _tasks(1.0, 2.0))


def test_the_type_of_a_state_is_preserved():
    loss = jaxmaml.with_state(lambda params, batch, state: (LOSS(params, batch), state + 1))
    learner = jaxmaml.maml(loss, optax.sgd(0.5), 1)
    state = jnp.zeros(3, jnp.bfloat16)
    _, _, info = jaxmaml.meta_grad(learner, jnp.array(0.0), _tasks(1.0, 2.0), state=state)
    assert info.state.dtype == jnp.bfloat16


def test_evaluate_takes_a_meta_state():
    with pytest.raises(TypeError, match="meta_state must be a MetaState"):
        jaxmaml.evaluate(LEARNER, LOSS, jnp.array(0.0), _tasks(1.0))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("specs", [None, "whole"])
def test_the_norm_of_a_gradient_in_half_precision_is_finite(specs):
    loss_fn = lambda params, batch: jnp.sum(params * batch)
    learner = jaxmaml.maml(loss_fn, optax.sgd(0.0), 1)
    state = jaxmaml.init_state(learner, optax.sgd(1e-3), jnp.float16(0.0))
    tasks = jaxmaml.Task(*[jnp.full((2, 1), 300, jnp.float16)] * 2)
    options = {} if specs is None else {
        "mesh": parallel.make_mesh(2), "specs": jax.sharding.PartitionSpec(),
    }  # fmt: skip
    _, metrics = jaxmaml.meta_step(learner, optax.sgd(1e-3), state, tasks, **options)
    assert metrics["grad_norm"] == 300


def test_parameters_may_be_numbers_of_python():
    learner = jaxmaml.maml(lambda params, batch: jnp.mean(params * batch), optax.sgd(0.1), 1)
    tasks = jaxmaml.Task(jnp.ones((2, 3)), jnp.full((2, 3), 2.0))
    _, grads, _ = jaxmaml.meta_grad(learner, 1.0, tasks)
    assert grads == 2
