"""fit: the same training whatever the source and the dispatch, and its stop at what is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmaml

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


def _items(source, num_outer_steps, **options):
    key = KEY if callable(source) else None
    return list(
        jaxmaml.fit(LEARNER, OPTIMIZER, _start(), source, num_outer_steps, key=key, **options)
    )


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


def test_a_partial_is_an_argument_of_the_program():
    offset = jnp.full((500, 500), 3.0)
    source = jax.tree_util.Partial(lambda offset, key: _source(key), offset)
    assert _items(source, 5)[-1][1]["loss"].shape == (5,)


@pytest.mark.parametrize("what", ["function", "iterable"])
def test_a_step_that_is_not_finite_stops_with_the_last_good_state(what):
    bad = 13

    def poisoned(key):
        is_bad = jnp.all(
            jax.random.key_data(key) == jax.random.key_data(jax.random.fold_in(KEY, bad))
        )
        return jax.tree.map(lambda x: jnp.where(is_bad, jnp.inf, x), _source(key))

    source = (
        poisoned
        if what == "function"
        else [poisoned(jax.random.fold_in(KEY, i)) for i in range(30)]
    )
    items = _items(source, 30, num_steps_per_dispatch=10)
    assert len(items) == 2
    meta_state, metrics = items[-1]
    assert metrics["stopped_at"] == int(meta_state.step) == bad
    assert "loss is" in metrics["stopped_because"]
    assert len(metrics["loss"]) == 4
    good = _items(_source, bad)[-1][0]
    np.testing.assert_allclose(meta_state.params, good.params, rtol=1e-6)


def test_a_gradient_that_is_not_finite_stops_though_the_loss_is_finite():
    # An input that is always zero: an inner Adam without eps_root has an infinite derivative there.
    loss = lambda params, batch: jnp.mean((batch @ params - 1.0) ** 2)
    learner = jaxmaml.maml(loss, optax.adam(0.01), 1)
    rows = jnp.ones((2, 3, 2)).at[..., 0].set(0.0)
    meta_state = jaxmaml.init_state(learner, OPTIMIZER, jnp.zeros(2))
    source = [jaxmaml.Task(rows, rows)] * 3
    ((last, metrics),) = jaxmaml.fit(learner, OPTIMIZER, meta_state, source, 3)
    assert metrics["stopped_at"] == 0
    assert metrics["stopped_because"] == "grad_norm is nan"
    np.testing.assert_array_equal(last.params, jnp.zeros(2))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (_source, {"num_outer_steps": 0}, "num_outer_steps must be a positive integer; got 0"),
        (_source, {"num_outer_steps": 5, "key": None}, "key must be given"),
        ([], {"num_outer_steps": 5, "key": KEY}, "key must be None"),
        (_source, {"num_outer_steps": 5, "num_steps_per_dispatch": 0}, "num_steps_per_dispatch"),
    ],
)
def test_errors_come_at_the_call(source, options, message):
    options = {"key": KEY if callable(source) else None} | options
    with pytest.raises(ValueError, match=message):
        jaxmaml.fit(LEARNER, OPTIMIZER, _start(), source, **options)


def test_a_source_that_ends_early_says_so():
    with pytest.raises(ValueError, match="ended after 3 batches of tasks; every outer step"):
        _items(_batches(3), 5)


def test_tasks_that_cannot_be():
    rows = jnp.zeros((3, 2))
    with pytest.raises(ValueError, match="leading task axis"):
        _items([jaxmaml.Task(rows, rows[:2])], 1)


@pytest.mark.parametrize("loss", [lambda p, b: p * b, lambda p, b: jnp.array(1)])
def test_a_loss_that_is_no_float_scalar(loss):
    learner = jaxmaml.maml(loss, optax.sgd(0.1), 1)
    with pytest.raises(TypeError, match="floating-point scalar"):
        jaxmaml.fit(learner, OPTIMIZER, _start(), _source, 5, key=KEY)
