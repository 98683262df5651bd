"""Sources of all three kinds give the same tasks through one iterator."""

import itertools
from typing import Any

import jax
import numpy as np
import pytest
from comparing import assert_equal

import jaxmaml
from jaxmaml import sources

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
