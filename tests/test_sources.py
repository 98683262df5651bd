"""Sources of all three kinds give the same tasks through one iterator."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparing import assert_equal

import jaxmaml
from jaxmaml import parallel, sources

KEY = jax.random.key(3)


def _draw(key):
    rows = jax.random.normal(key, (4, 2))
    return jaxmaml.Task(rows, rows + 1)


class _Stream:
    """A stream of the same tasks that knows whether it was closed."""

    closed = 0

    def start(self, key, step=0):
        self.key, self.step = key, step
        return self

    def __enter__(self):
        return (_draw(jax.random.fold_in(self.key, i)) for i in itertools.count(self.step))

    def __exit__(self, *_):
        self.closed += 1


@pytest.mark.parametrize(
    "source",
    [_draw, jax.tree_util.Partial(_draw), _Stream()],
    ids=["function", "partial", "stream"],
)
def test_tasks_depend_on_the_key_and_the_step_only(source):
    expected = [_draw(jax.random.fold_in(KEY, step)) for step in range(4)]
    found = list(itertools.islice(sources.batches(source, KEY), 4))
    later = next(sources.batches(source, KEY, first_step=3))
    for tasks, wanted in zip([*found, later], [*expected, expected[3]], strict=True):
        np.testing.assert_allclose(tasks.support, wanted.support, rtol=1e-6)


def test_an_iterable_keeps_its_order():
    batches = [_draw(KEY), _draw(jax.random.key(4))]
    assert_equal(list(sources.batches(batches, None)), batches)


def test_a_stream_is_closed_with_its_iterator():
    stream = _Stream()
    tasks: Any = sources.batches(stream, KEY)
    next(tasks)
    assert stream.closed == 0
    tasks.close()
    assert stream.closed == 1


@pytest.mark.parametrize(
    ("source", "key", "error", "message"),
    [
        (_draw, None, ValueError, "key must be given"),
        (_Stream(), None, ValueError, "key must be given"),
        ([], KEY, ValueError, "key must be None"),
        (3, None, TypeError, "a source must be a function key -> tasks"),
    ],
)
def test_a_key_is_given_exactly_if_it_is_needed(source, key, error, message):
    with pytest.raises(error, match=message):
        sources.batches(source, key)


class _Plain:
    """A sampler that JAX does not know: neither a pytree nor a function."""

    num_tasks = 4

    def __call__(self, key):
        return _draw(key)

    def some(self, key, index):
        return jax.tree.map(lambda leaf: leaf[index], _draw(key))


@dataclasses.dataclass
class _Unhashable(_Plain):
    scale: float = 1.0


@pytest.mark.parametrize(("make", "mesh"), [(_Plain, 2), (_Unhashable, None)])
def test_an_object_that_can_be_called_is_a_source(make, mesh):
    learner = jaxmaml.maml(lambda params, batch: jnp.mean((params - batch) ** 2), optax.sgd(0.1), 1)
    optimizer = optax.sgd(0.1)
    state = jaxmaml.init_state(learner, optimizer, jnp.zeros(2))
    mesh = None if mesh is None else parallel.make_mesh(mesh)
    ends = []
    for source in (make(), _draw):
        *_, (state_after, _) = jaxmaml.fit(learner, optimizer, state, source, 2, key=KEY, mesh=mesh)
        scores = jaxmaml.evaluate(
            learner, lambda params, query: jnp.mean(params + query), state_after, source,
            num_tasks=4, key=KEY,
        )  # fmt: skip
        ends.append((np.asarray(state_after.params), scores))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *ends)
