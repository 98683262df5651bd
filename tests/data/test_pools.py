"""Pools: the tasks sampled from them, and the programs that sample."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import CHI_SQUARE_999, chi_square, identities, noise, pool_of

from jaxmaml.data import episodes, pools


def test_from_arrays_sorts_by_class_and_keeps_every_image():
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
    pool = pools.from_arrays(images, [2, 0, 2, 1, 0], ["a", "b", "c"])
    assert pool.images.ravel().tolist() == [1, 4, 3, 0, 2]
    assert pool.starts.tolist() == [0, 2, 3]
    assert pool.sizes.tolist() == [2, 1, 2]
    assert pool.names == ("a", "b", "c")
    assert pool.shape == (1, 1, 1)
    assert pool.images.dtype == jnp.uint8
    assert pool.starts.dtype == pool.sizes.dtype == jnp.int32


def test_from_images_puts_every_image_on_the_device():
    images = noise()
    pool = pools.from_images(images)
    assert isinstance(pool.images, jax.Array)
    np.testing.assert_array_equal(pool.images, images.read(np.arange(37)))
    np.testing.assert_array_equal(pool.sizes, images.sizes)
    assert pool.names == images.names


@settings(max_examples=4)
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
    assert chi_square(counts) < CHI_SQUARE_999[15]  # the two slots turn independently


def test_nothing_turns_without_rotate():
    images = np.arange(24, dtype=np.uint8).reshape(4, 2, 3, 1)
    pool = pools.from_arrays(images, [0, 0, 1, 1], ["a", "b"])
    task = jax.jit(pools.sampler(pool, num_tasks=20, way=2, shot=1, query=1))(jax.random.key(0))
    drawn = np.rint(np.asarray(task.support["inputs"]) * 255).astype(np.uint8)
    assert drawn.shape == (20, 2, 2, 3, 1)
    assert {image.tobytes() for image in drawn.reshape(-1, 6)} == {i.tobytes() for i in images}


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


def test_class_indices_are_those_of_the_pool():
    pool = pool_of([3, 5, 4, 6])
    sample = pools.sampler(pool, num_tasks=6, way=3, shot=1, query=2, classes=True)
    for batch in jax.jit(sample)(jax.random.key(0)):
        np.testing.assert_array_equal(batch["classes"], identities(batch)[..., 0])
        assert batch["classes"].dtype == jnp.int32
        assert batch["classes"].shape == batch["targets"].shape


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"way": 4}, ValueError, "way=4 is more than the 3 classes there are"),
        ({"shot": 3, "query": 2}, ValueError, r"shot \+ query = 3 \+ 2 .* 'class 1' has 4 images"),
        ({"shot": 1.0}, TypeError, r"shot must be an integer, 1 or more; got 1\.0"),
    ],
)
def test_sampler_refuses(changed, error, message):
    settings = {"num_tasks": 1, "way": 2, "shot": 1, "query": 1} | changed
    with pytest.raises(error, match=message):
        pools.sampler(pool_of([5, 4, 6]), **settings)
