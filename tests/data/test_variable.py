"""Episodes of varying way and shot: the rules of Meta-Dataset, and padding that has no weight."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import identities, pool_of

from jaxmaml.data import variable


def sampled(sizes, key=0, num_tasks=50, **options):
    sample = variable.sampler(pool_of(sizes), num_tasks=num_tasks, **options)
    return jax.tree.map(np.asarray, jax.jit(sample)(jax.random.key(key)))


@settings(max_examples=3, deadline=None)  # each example compiles a program
@given(data=st.data())
def test_episodes_hold_their_rules(data):
    sizes = data.draw(st.lists(st.integers(2, 12), min_size=2, max_size=6))
    max_way = data.draw(st.integers(2, len(sizes)))
    max_shot, max_query = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    options = {"max_way": max_way, "max_shot": max_shot, "max_query": max_query}
    tasks = sampled(sizes, key=data.draw(st.integers(0, 99)), num_tasks=20, **options)
    for number in range(20):
        support, query = _one(tasks, number)
        _check_task(support, query, sizes, max_way, max_query)


def _one(tasks, number):
    return jax.tree.map(lambda leaf: leaf[number : number + 1], tasks)


def _check_task(support, query, sizes, max_way, max_query):
    seen, class_of = set(), {}
    for batch in (support, query):
        weights, targets = batch["weights"][0], batch["targets"][0]
        for weight, slot, (label, example) in zip(
            weights, targets, identities(batch)[0], strict=True
        ):
            if weight == 0:
                continue
            assert weight == 1
            assert class_of.setdefault(slot, label) == label
            assert (label, example) not in seen
            seen.add((label, example))
    way = len(class_of)
    assert 2 <= way <= max_way
    assert sorted(class_of) == list(range(way))
    assert len(set(class_of.values())) == way
    smallest = min(sizes[label] for label in class_of.values())
    counts = np.bincount(query["targets"][0][query["weights"][0] > 0], minlength=way)
    assert (counts == min(max_query, smallest // 2)).all()
    shots = np.bincount(support["targets"][0][support["weights"][0] > 0], minlength=way)
    assert shots.min() >= 1


def test_way_is_uniform_and_shots_vary():
    tasks = sampled([20] * 8, num_tasks=3000, max_way=8, max_shot=10, max_query=5)
    weights = tasks.support["weights"].reshape(3000, 8, 10).sum(-1)
    ways = np.bincount((weights > 0).sum(-1), minlength=9)
    assert ways[:2].sum() == 0
    assert abs(ways[2:] - 3000 / 7).max() < 100
    assert set(np.unique(weights)) == set(range(11))


def test_support_is_bounded():
    tasks = sampled([20] * 8, max_way=8, max_shot=10, max_query=5, max_support=12, num_tasks=500)
    assert tasks.support["weights"].sum(1).max() <= 12


def test_unequal_classes_give_larger_ones_more_shots():
    tasks = sampled([4, 40], num_tasks=2000, max_way=2, max_shot=20, max_query=2)
    labels = np.rint(tasks.support["inputs"][:, :, 0, 0, 0] * 255)
    counted = tasks.support["weights"] > 0
    assert (counted & (labels == 1)).sum() > 3 * (counted & (labels == 0)).sum()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"max_way": 4}, ValueError, "at most the 3 classes"),
        ({"min_way": 3, "max_way": 2}, ValueError, "min_way=3 must be at most max_way=2"),
        ({"max_shot": 0}, ValueError, "max_shot must be an integer, 1 or more"),
        ({"max_query": 1.5}, TypeError, "max_query must be an integer, 1 or more"),
        ({"max_support": 1}, ValueError, "max_support=1 must be at least max_way=2"),
        ({"sizes": [5, 1, 4]}, ValueError, "'class 1' has one image"),
    ],
)
def test_settings_that_cannot_be_are_refused(changed, error, message):
    options = {"sizes": [5, 6, 4], "max_way": 2, "max_shot": 3} | changed
    with pytest.raises(error, match=message):
        sampled(options.pop("sizes"), **options)
