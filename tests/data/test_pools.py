"""Episodes sampled from pools: what they may contain, how often, and in which order."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmaml.data import episodes, pools

# 99.9th percentile of the chi-square distribution, by degrees of freedom.
CHI_SQUARE_999 = {5: 20.52, 6: 22.46, 9: 27.88, 11: 31.26}


def pool_of(sizes, side=2):
    """A pool whose first pixel is the class and whose second is the example within it."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    images = np.zeros((len(labels), side, side, 1), np.uint8)
    images[:, 0, 0, 0] = labels
    images[:, 0, 1, 0] = np.concatenate([np.arange(size) for size in sizes])
    return pools.from_arrays(images, labels, [f"class {i}" for i in range(len(sizes))])


def identities(batch):
    """(class, example) of each image of tasks, `[num_tasks, num_examples, 2]`."""
    pixels = np.asarray(batch["inputs"])[:, :, 0, :2, 0] * 255
    return np.rint(pixels).astype(int)


def chi_square(counts):
    expected = np.mean(counts)
    return np.sum((counts - expected) ** 2 / expected)


def plans(key, num_plans, sizes, **settings):
    sizes = jnp.asarray(sizes, jnp.int32)
    starts = jnp.cumsum(sizes) - sizes
    draw = jax.jit(jax.vmap(lambda k: episodes.plan(k, starts, sizes, **settings)))
    return jax.tree.map(np.asarray, draw(jax.random.split(key, num_plans)))


def test_from_arrays_sorts_by_class_and_keeps_every_image():
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
    pool = pools.from_arrays(images, [2, 0, 2, 1, 0], ["a", "b", "c"])
    assert pool.images.ravel().tolist() == [1, 4, 3, 0, 2]
    assert pool.starts.tolist() == [0, 2, 3]
    assert pool.sizes.tolist() == [2, 1, 2]
    assert pool.names == ("a", "b", "c")
    assert pool.images.dtype == jnp.uint8
    assert pool.starts.dtype == pool.sizes.dtype == jnp.int32


@pytest.mark.parametrize(
    ("images", "labels", "names", "error", "message"),
    [
        (np.zeros((2, 3, 3, 1)), [0, 1], "ab", TypeError, "images must be uint8, got float64"),
        (np.zeros((2, 3, 3, 1), np.uint8), [0.0, 1.0], "ab", TypeError, "labels must be integers"),
        (np.zeros((2, 3, 3), np.uint8), [0, 1], "ab", ValueError, r"images must be \[num_images"),
        (np.zeros((2, 3, 3, 1), np.uint8), [0], "ab", ValueError, r"and labels \[num_images\]"),
        (np.zeros((2, 3, 3, 1), np.uint8), [0, 2], "ab", ValueError, r"labels must lie in 0\.\.1"),
        (np.zeros((2, 3, 3, 1), np.uint8), [0, -1], "ab", ValueError, r"labels must lie in 0\.\.1"),
        (np.zeros((2, 3, 3, 1), np.uint8), [0, 0], "ab", ValueError, "class 'b' has no images"),
        (np.zeros((2, 3, 3, 1), np.uint8), [0, 1], "aa", ValueError, "names must be distinct"),
    ],
)
def test_from_arrays_refuses(images, labels, names, error, message):
    with pytest.raises(error, match=message):
        pools.from_arrays(images, labels, list(names))


@settings(max_examples=4, deadline=None, derandomize=True)
@given(data=st.data())
def test_episodes_of_unequal_classes(data):
    sizes = data.draw(st.lists(st.integers(2, 9), min_size=1, max_size=6), label="sizes")
    way = data.draw(st.integers(1, len(sizes)), label="way")
    shot = data.draw(st.integers(1, min(sizes) - 1), label="shot")
    query = data.draw(st.integers(1, min(sizes) - shot), label="query")
    seed = data.draw(st.integers(0, 2**31 - 1), label="seed")
    sample = pools.sampler(pool_of(sizes), num_tasks=4, way=way, shot=shot, query=query)
    task = jax.jit(sample)(jax.random.key(seed))

    assert task.support["inputs"].shape == (4, way * shot, 2, 2, 1)
    assert task.query["inputs"].shape == (4, way * query, 2, 2, 1)
    assert task.support["targets"].tolist() == [np.repeat(np.arange(way), shot).tolist()] * 4
    assert task.query["targets"].tolist() == [np.repeat(np.arange(way), query).tolist()] * 4
    support = identities(task.support).reshape(4, way, shot, 2)
    queried = identities(task.query).reshape(4, way, query, 2)
    drawn = np.concatenate([support, queried], axis=2)
    # One class per slot, the same in support and query, and no class in two slots.
    assert (drawn[..., 0] == drawn[:, :, :1, 0]).all()
    assert all(len(set(classes)) == way for classes in drawn[:, :, 0, 0])
    # No example twice in a task, so none in both support and query; all of them exist.
    assert all(len(set(map(tuple, task.reshape(-1, 2)))) == task[..., 0].size for task in drawn)
    assert (drawn[..., 1] < np.array(sizes)[drawn[..., 0]]).all()


def test_images_are_floats_in_unit_range():
    pool = pools.from_arrays(np.array([0, 51, 255], np.uint8).reshape(3, 1, 1, 1), [0, 0, 0], ["a"])
    task = jax.jit(pools.sampler(pool, num_tasks=1, way=1, shot=2, query=1))(jax.random.key(0))
    values = np.concatenate([task.support["inputs"].ravel(), task.query["inputs"].ravel()])
    assert values.dtype == np.float32
    np.testing.assert_allclose(np.sort(values), [0, 0.2, 1], rtol=1e-6)


def test_classes_are_equally_frequent_whatever_their_sizes():
    sizes = [3, 40, 5, 3, 12, 7, 3]
    examples = plans(jax.random.key(1), 2000, sizes, way=1, shot=1, query=1, rotate=False).examples
    classes = np.searchsorted(np.cumsum(sizes), examples[:, 0, 0], side="right")
    assert chi_square(np.bincount(classes, minlength=7)) < CHI_SQUARE_999[6]


def test_classes_are_equally_frequent_in_every_slot():
    sizes = [4] * 6
    examples = plans(jax.random.key(2), 3000, sizes, way=3, shot=1, query=1, rotate=False).examples
    for slot in range(3):
        counts = np.bincount(examples[:, slot, 0] // 4, minlength=6)
        assert chi_square(counts) < CHI_SQUARE_999[5]


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_every_example_is_equally_frequent_at_every_position(position):
    # Floyd's set alone has an order that depends on size; 4 of 10 and 4 of 4 are both covered.
    examples = plans(jax.random.key(3), 4000, [10], way=1, shot=1, query=3, rotate=False).examples
    assert chi_square(np.bincount(examples[:, 0, position], minlength=10)) < CHI_SQUARE_999[9]


def test_ordered_pairs_are_equally_frequent():
    examples = plans(jax.random.key(4), 6000, [4], way=1, shot=1, query=1, rotate=False).examples
    codes = examples[:, 0, 0] * 4 + examples[:, 0, 1]
    counts = np.bincount(codes, minlength=16)
    assert (counts[[0, 5, 10, 15]] == 0).all()
    assert chi_square(np.delete(counts, [0, 5, 10, 15])) < CHI_SQUARE_999[11]


def test_the_whole_class_can_be_used():
    examples = plans(jax.random.key(5), 50, [4, 6], way=2, shot=2, query=2, rotate=False).examples
    small = examples[(examples < 4).all(-1)]
    assert len(small) == 50
    assert (np.sort(small, axis=-1) == np.arange(4)).all()


def test_plan_takes_host_arrays_under_jit():
    sizes = np.array([3, 4])
    settings = {"way": 2, "shot": 1, "query": 1, "rotate": True}
    eager = episodes.plan(jax.random.key(0), np.array([0, 3]), sizes, **settings)
    jitted = jax.jit(lambda key: episodes.plan(key, np.array([0, 3]), sizes, **settings))
    jax.tree.map(np.testing.assert_array_equal, eager, jitted(jax.random.key(0)))
    assert eager.examples.dtype == eager.rotations.dtype == jnp.int32


def test_same_key_same_task_and_another_key_another_task():
    sample = pools.sampler(pool_of([9] * 8), num_tasks=2, way=3, shot=2, query=2, rotate=True)
    first, again, other = (jax.jit(sample)(jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (identities(first.support) != identities(other.support)).any()
    assert (first.query["inputs"][0] != first.query["inputs"][1]).any()


def test_the_sampled_task_is_the_planned_one():
    pool = pool_of([5, 7, 6])
    settings: dict[str, Any] = {"way": 2, "shot": 1, "query": 2, "rotate": False}
    key = jax.random.key(7)
    task = jax.jit(pools.sampler(pool, num_tasks=1, **settings))(key)
    plan = jax.jit(lambda key: episodes.plan(key, pool.starts, pool.sizes, **settings))
    planned = plan(jax.random.split(key, 1)[0])
    expected = np.asarray(pool.images)[np.asarray(planned.examples)]
    support, query = (np.rint(batch["inputs"][0] * 255) for batch in task)
    np.testing.assert_array_equal(support, expected[:, :1].reshape(2, 2, 2, 1))
    np.testing.assert_array_equal(query, expected[:, 1:].reshape(4, 2, 2, 1))


def test_rotation_is_one_multiple_of_90_degrees_per_class_slot():
    images = np.tile(np.arange(1, 10, dtype=np.uint8).reshape(1, 3, 3, 1), (24, 1, 1, 1))
    pool = pools.from_arrays(images, np.arange(24) % 4, list("abcd"))
    sample = pools.sampler(pool, num_tasks=500, way=2, shot=2, query=3, rotate=True)
    task = jax.tree.map(np.asarray, jax.jit(sample)(jax.random.key(0)))
    drawn = np.concatenate(
        [
            task.support["inputs"].reshape(500, 2, 2, 3, 3),
            task.query["inputs"].reshape(500, 2, 3, 3, 3),
        ],
        axis=2,
    )
    turned = np.stack([np.rot90(images[0, :, :, 0], turns) for turns in range(4)])
    matches = (np.rint(drawn * 255)[:, :, :, None] == turned).all((-2, -1))
    assert (matches.sum(-1) == 1).all()
    turns = matches.argmax(-1)
    assert (turns == turns[:, :, :1]).all()
    counts = np.bincount(4 * turns[:, 0, 0] + turns[:, 1, 0], minlength=16)
    assert chi_square(counts) < 37.70  # 15 degrees of freedom: the two slots turn independently


def test_nothing_turns_without_rotate():
    planned = plans(jax.random.key(0), 50, [3, 3], way=2, shot=1, query=1, rotate=False)
    assert not planned.rotations.any()
    pool = pools.from_arrays(np.zeros((4, 2, 3, 1), np.uint8), [0, 0, 1, 1], ["a", "b"])
    task = jax.jit(pools.sampler(pool, num_tasks=1, way=2, shot=1, query=1))(jax.random.key(0))
    assert task.support["inputs"].shape == (1, 2, 2, 3, 1)
    with pytest.raises(ValueError, match=r"rotate=True needs square images, got \(2, 3\)"):
        pools.sampler(pool, num_tasks=1, way=2, shot=1, query=1, rotate=True)


def test_the_images_are_an_argument_of_the_program_and_samplers_share_its_trace():
    traces = []

    @jax.jit
    def total(sample, key):
        traces.append(1)
        return sample(key).support["inputs"].sum()

    def sampler_of(value, shot=1):
        images = np.full((6, 2, 2, 1), value, np.uint8)
        pool = pools.from_arrays(images, np.arange(6) % 2, ["a", "b"])
        return pools.sampler(pool, num_tasks=1, way=2, shot=shot, query=1)

    key = jax.random.key(0)
    assert total(sampler_of(255), key) == 8
    assert total(sampler_of(0), key) == 0
    assert len(traces) == 1
    assert total(sampler_of(255, shot=2), key) == 16
    assert len(traces) == 2
    assert not jax.make_jaxpr(lambda s, k: s(k))(sampler_of(255), key).consts


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"way": 4}, "way=4 is more than the 3 classes there are"),
        ({"shot": 3, "query": 2}, r"shot \+ query = 3 \+ 2 .* 'class 1' has 4 images"),
        ({"way": 0}, "way must be a positive integer, got 0"),
        ({"shot": 0}, "shot must be a positive integer, got 0"),
        ({"query": -1}, "query must be a positive integer, got -1"),
        ({"num_tasks": 0}, "num_tasks must be a positive integer, got 0"),
        ({"shot": 1.0}, r"shot must be a positive integer, got 1\.0"),
    ],
)
def test_sampler_refuses(changed, message):
    settings = {"num_tasks": 1, "way": 2, "shot": 1, "query": 1} | changed
    with pytest.raises(ValueError, match=message):
        pools.sampler(pool_of([5, 4, 6]), **settings)
