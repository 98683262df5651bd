"""fit: the same training for every source and dispatch, and its error at the first non-finite step."""

import inspect
import pickle
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmaml
from jaxmaml import fitting
from jaxmaml.checkpoint import Manager

LOSS = lambda params, batch: jnp.mean((params - batch) ** 2)
LEARNER = jaxmaml.maml(LOSS, optax.sgd(0.1), 1)
OPTIMIZER = optax.adam(0.1)
KEY = jax.random.key(0)


def _source(key):
    rows = 3 + jax.random.normal(key, (4, 2))
    return jaxmaml.Task(rows, rows)


def _start():
    return jaxmaml.init_state(LEARNER, OPTIMIZER, jnp.array(0.0))


def _batches(number, start=0):
    return [_source(jax.random.fold_in(KEY, step)) for step in range(start, start + number)]


def _fit(source: Any, num_outer_steps, **options):
    key = KEY if callable(source) else None
    tasks = cast("Any", source)
    return jaxmaml.fit(LEARNER, OPTIMIZER, _start(), tasks, num_outer_steps, key=key, **options)


def _items(source, num_outer_steps, **options):
    return list(_fit(source, num_outer_steps, **options))


def test_source_and_dispatch_change_nothing():
    reference = _items(_source, 25)
    losses = reference[0][1]["loss"]
    assert losses.shape == (25,)
    for source, per_dispatch in ((_source, 10), (_batches(25), 10), (iter(_batches(25)), 7)):
        items = _items(source, 25, num_steps_per_dispatch=per_dispatch)
        assert [len(metrics["loss"]) for _, metrics in items][:-1] == [per_dispatch] * (
            len(items) - 1
        )
        found = np.concatenate([metrics["loss"] for _, metrics in items])
        np.testing.assert_allclose(found, losses, rtol=1e-5)
        assert int(items[-1][0].step) == 25


def test_loss_falls():
    losses = _items(_source, 200)[0][1]["query_loss"]
    assert losses[-20:].mean() < 0.3 * losses[:5].mean()


def test_resuming_continues_the_same_run():
    whole = _items(_source, 20)[-1][0]
    half = _items(_source, 10)[-1][0]
    resumed = list(jaxmaml.fit(LEARNER, OPTIMIZER, half, _source, 10, key=KEY))[-1][0]
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_the_arrays_of_a_partial_are_an_argument_of_the_program():
    offset = jnp.full((500, 500), 3.0)

    def shifted(offset, key):
        return jax.tree.map(lambda leaf: leaf + offset[0, 0], _source(key))

    def argument_bytes(source):
        program = fitting.compile_program(LEARNER, OPTIMIZER, _start(), source, key=KEY)
        compiled = inspect.getclosurevars(program.run).nonlocals["compiled"]
        return compiled.memory_analysis().argument_size_in_bytes

    assert argument_bytes(jax.tree_util.Partial(shifted, offset)) > offset.nbytes
    assert argument_bytes(lambda key: shifted(offset, key)) < offset.nbytes


@pytest.mark.parametrize("what", ["function", "iterable"])
def test_a_step_that_is_not_finite_raises_with_the_last_good_state(what):
    bad = 13

    def poisoned(key):
        is_bad = jnp.all(
            jax.random.key_data(key) == jax.random.key_data(jax.random.fold_in(KEY, bad))
        )
        return jax.tree.map(lambda x: jnp.where(is_bad, jnp.inf, x), _source(key))

    source: Any = poisoned
    if what == "iterable":
        source = [poisoned(jax.random.fold_in(KEY, i)) for i in range(30)]
    items = []
    with pytest.raises(jaxmaml.NonFiniteError) as caught:
        items.extend(_fit(source, 30, num_steps_per_dispatch=10))
    error = caught.value
    # The state before the bad step is good only if its own loss was finite.
    assert error.step == bad
    assert int(error.meta_state.step) == bad - 1
    assert "loss is" in error.what
    assert len(error.metrics["loss"]) == 4
    good = _items(_source, bad - 1)[-1][0]
    np.testing.assert_allclose(error.meta_state.params, good.params, rtol=1e-6)
    # An iterable cannot give the tasks of the step again, so nothing is known of the cause.
    found = "task 0, support" in str(error)
    assert found == (what == "function")


def test_the_items_before_a_step_that_is_not_finite_are_yielded():
    rows = jnp.full((4, 2), jnp.nan)
    batches = _batches(15)
    batches[13] = jaxmaml.Task(rows, rows)
    items = _fit(batches, 15, num_steps_per_dispatch=5)
    assert [int(next(items)[0].step), int(next(items)[0].step)] == [5, 10]
    with pytest.raises(jaxmaml.NonFiniteError, match="outer step 13"):
        next(items)


def test_a_gradient_that_is_not_finite_raises_under_a_finite_loss():
    # The norm of parameters that are zero has an infinite derivative.
    loss = lambda params, batch: jnp.sqrt(jnp.sum(params**2)) + jnp.mean(batch * params)
    learner = jaxmaml.maml(loss, optax.sgd(0.01), 0)
    rows = jnp.ones((2, 3, 2))
    meta_state = jaxmaml.init_state(learner, OPTIMIZER, jnp.zeros(2))
    source = lambda key: jaxmaml.Task(rows, rows)
    with pytest.raises(jaxmaml.NonFiniteError, match="a norm at zero") as caught:
        list(jaxmaml.fit(learner, OPTIMIZER, meta_state, source, 3, key=KEY))
    assert caught.value.step == 0
    assert caught.value.what == "grad_norm is nan"
    np.testing.assert_array_equal(caught.value.meta_state.params, jnp.zeros(2))


@pytest.mark.parametrize("what", ["function", "iterable"])
def test_an_update_that_overflows_raises_with_the_state_before_it(what):
    source = _source if what == "function" else _batches(5)
    key = KEY if what == "function" else None
    optimizer = optax.sgd(lambda count: jnp.where(count == 2, jnp.inf, 0.1))
    meta_state = jaxmaml.init_state(LEARNER, optimizer, _start().params)
    with pytest.raises(jaxmaml.NonFiniteError, match="learning rate") as caught:
        list(jaxmaml.fit(LEARNER, optimizer, meta_state, source, 5, key=key))
    assert caught.value.step == int(caught.value.meta_state.step) == 2
    assert caught.value.what == "the updated parameters or the state are not finite"
    assert np.isfinite(caught.value.meta_state.params).all()


def test_a_state_that_overflows_raises_and_one_that_is_infinite_on_purpose_does_not():
    @jaxmaml.with_state
    def loss_fn(params, batch, state):
        mean, least = state["mean"] * 1e30 + 1, jnp.minimum(state["least"], jnp.inf)
        return jnp.mean((params - batch) ** 2), {"mean": mean, "least": least}

    learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), 0)
    state = {"mean": jnp.array(0.0), "least": jnp.array(jnp.inf)}
    meta_state = jaxmaml.init_state(learner, OPTIMIZER, jnp.array(0.0), state)
    with pytest.raises(jaxmaml.NonFiniteError, match="statistic in the state") as caught:
        list(jaxmaml.fit(learner, OPTIMIZER, meta_state, _source, 5, key=KEY))
    assert caught.value.step == 2
    assert np.isfinite(caught.value.meta_state.state["mean"])


def test_the_last_good_state_has_a_finite_loss():
    # The second update makes parameters that are finite and whose loss is not.
    optimizer = optax.sgd(lambda count: jnp.where(count == 1, 1e30, 0.1))
    meta_state = jaxmaml.init_state(LEARNER, optimizer, _start().params)
    with pytest.raises(jaxmaml.NonFiniteError) as caught:
        list(
            jaxmaml.fit(
                LEARNER, optimizer, meta_state, _source, 5, key=KEY, num_steps_per_dispatch=2
            )
        )
    error = caught.value
    assert error.step == 2
    assert int(error.meta_state.step) == 1
    tasks = _source(jax.random.fold_in(KEY, 2))
    assert np.isfinite(jaxmaml.meta_grad(LEARNER, error.meta_state.params, tasks)[0])


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (_source, {"num_outer_steps": 0}, "num_outer_steps must be an integer, 1 or more; got 0"),
        (_source, {"num_outer_steps": 5, "key": None}, "key must be given"),
        ([], {"num_outer_steps": 5, "key": KEY}, "key must be None"),
        (_source, {"num_outer_steps": 5, "num_steps_per_dispatch": 0}, "num_steps_per_dispatch"),
    ],
)
def test_errors_come_at_the_call(source, options, message):
    options = {"key": KEY if callable(source) else None} | options
    with pytest.raises(ValueError, match=message):
        jaxmaml.fit(LEARNER, OPTIMIZER, _start(), cast("Any", source), **options)


def test_a_source_that_ends_early_says_so():
    with pytest.raises(ValueError, match="ended after 3 batches of tasks; every outer step"):
        _items(_batches(3), 5)


def test_wrong_tasks_are_refused():
    rows = jnp.zeros((3, 2))
    with pytest.raises(ValueError, match="leading task axis"):
        _items([jaxmaml.Task(rows, rows[:2])], 1)


@pytest.mark.parametrize("wrong", [(4, 3), (5, 2)])
def test_tasks_of_another_shape_are_refused_with_their_step(wrong):
    rows = jnp.zeros((4, 2))
    batches = [jaxmaml.Task(rows, rows)] * 3 + [jaxmaml.Task(rows, jnp.zeros(wrong))]
    if wrong[0] == 5:
        batches[3] = jaxmaml.Task(jnp.zeros(wrong), jnp.zeros(wrong))
    with pytest.raises(
        ValueError, match=r"outer step 3 differ.*: (query|support) is float32\[.*was float32\[4,2\]"
    ):
        list(_fit(batches, 4))


@pytest.mark.parametrize("loss", [lambda p, b: p * b, lambda p, b: jnp.array(1)])
def test_a_loss_that_is_not_a_float_scalar_is_refused(loss):
    learner = jaxmaml.maml(loss, optax.sgd(0.1), 1)
    with pytest.raises(TypeError, match="floating-point scalar"):
        jaxmaml.fit(learner, OPTIMIZER, _start(), _source, 5, key=KEY)


def test_a_failing_diagnosis_does_not_lose_the_last_good_state():
    def broken(*_, **__):
        raise NotImplementedError("no trace")

    nan = lambda key: jax.tree.map(lambda leaf: leaf * jnp.nan, _source(key))
    learner = LEARNER._replace(trace=broken)
    with pytest.raises(jaxmaml.NonFiniteError, match="no trace") as caught:
        list(jaxmaml.fit(learner, OPTIMIZER, _start(), nan, 1, key=KEY))
    assert float(caught.value.meta_state.params) == 0.0


def test_the_error_can_be_sent_to_another_process():
    error = jaxmaml.NonFiniteError(3, "loss is nan", None, _start(), {"loss": np.ones(2)})
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.step, copy.what, str(copy)) == (3, "loss is nan", str(error))


def _failing(bad, source=_source):
    """Returns `source` with tasks that are not finite at some steps."""

    def failing(key):
        keys = jax.vmap(lambda step: jax.random.fold_in(KEY, step))(jnp.array(bad))
        is_bad = jnp.any(jnp.all(jax.random.key_data(keys) == jax.random.key_data(key), axis=-1))
        return jax.tree.map(lambda x: jnp.where(is_bad, jnp.nan, x), source(key))

    return failing


def _skipping(source, num_outer_steps, **options):
    return _items(source, num_outer_steps, on_nonfinite="skip", **options)


@pytest.mark.parametrize("what", ["function", "iterable"])
def test_a_step_that_is_not_finite_can_be_skipped(what):
    bad = (0, 4, 5)
    source: Any = _failing(bad)
    if what == "iterable":
        source = [source(jax.random.fold_in(KEY, step)) for step in range(8)]
    items = _skipping(source, 8, num_steps_per_dispatch=3)
    metrics = {name: np.concatenate([m[name] for _, m in items]) for name in items[0][1]}
    np.testing.assert_array_equal(np.flatnonzero(metrics["skipped"]), bad)
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(metrics["loss"])), bad)

    # The others are made as if the skipped ones had never been, but for the tasks and the step.
    meta_state, step = _start(), jax.jit(jaxmaml.meta_step, static_argnums=(0, 1))
    for number in (1, 2, 3, 6, 7):
        tasks = _source(jax.random.fold_in(KEY, number))
        meta_state, _ = step(LEARNER, OPTIMIZER, meta_state, tasks)
    found = items[-1][0]
    assert int(found.step) == 8
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        found._replace(step=0), meta_state._replace(step=0),
    )  # fmt: skip


def test_an_update_or_a_state_that_is_not_finite_is_skipped_too():
    @jaxmaml.with_state
    def loss_fn(params, batch, state):
        return jnp.mean((params - batch) ** 2), state / jnp.max(batch)

    learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), 0)
    meta_state = jaxmaml.init_state(learner, OPTIMIZER, jnp.array(0.0), jnp.array(1.0))
    tasks = [jaxmaml.Task(jnp.full((2, 3), x), jnp.full((2, 3), x)) for x in (2.0, 0.0, 4.0)]
    ((found, metrics),) = jaxmaml.fit(learner, OPTIMIZER, meta_state, tasks, 3, on_nonfinite="skip")
    np.testing.assert_array_equal(metrics["skipped"], [False, True, False])
    assert np.isfinite(metrics["loss"]).all()
    assert float(found.state) == pytest.approx(1 / 8)


@pytest.mark.parametrize(
    ("bad", "num_outer_steps", "failed"),
    [(range(3, 200), 150, 102), (range(9), 9, 8)],
)
def test_a_training_that_only_skips_raises(bad, num_outer_steps, failed):
    """The bound is 100 steps in a row, or all steps."""
    with pytest.raises(jaxmaml.NonFiniteError, match="steps before it were skipped") as caught:
        _skipping(_failing(bad), num_outer_steps, num_steps_per_dispatch=num_outer_steps)
    error = caught.value
    assert error.step == failed
    assert len(error.metrics["loss"]) == failed + 1
    assert error.metrics["skipped"].sum() == failed - bad[0]
    assert np.isfinite(error.meta_state.params)
    assert _skipping(_failing(range(1, 9)), 9)[-1][1]["skipped"].sum() == 8


def test_skips_in_a_row_are_counted_across_an_interruption(tmp_path):
    source, options = _failing(range(6, 300)), {"on_nonfinite": "skip", "num_steps_per_dispatch": 5}
    half = _fit(source, 150, checkpoints=Manager(tmp_path, every=5), **options)
    for meta_state, _ in half:
        if int(meta_state.step) == 50:
            break
    del half
    resumed = _fit(source, 150, checkpoints=Manager(tmp_path, every=5), **options)
    with pytest.raises(jaxmaml.NonFiniteError) as caught:
        list(resumed)
    assert caught.value.step == 105


def test_on_nonfinite_is_raise_or_skip():
    with pytest.raises(ValueError, match="on_nonfinite must be one of raise, skip; got 'ignore'"):
        _fit(_source, 5, on_nonfinite="ignore")
