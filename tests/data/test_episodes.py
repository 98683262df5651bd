"""Episodes: which examples are drawn, how often and in which order; which settings are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from image_sets import CHI_SQUARE_999, chi_square, pool_of

from jaxmaml.data import episodes, pools
from jaxmaml.data.augmentation import Augment
from jaxmaml.data.episodes import Episode


def plans(key, num_plans, sizes, **settings):
    sizes = jnp.asarray(sizes, jnp.int32)
    starts = jnp.cumsum(sizes) - sizes
    draw = jax.jit(jax.vmap(lambda k: episodes.plan(k, starts, sizes, **settings)))
    return jax.tree.map(np.asarray, draw(jax.random.split(key, num_plans)))


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


@pytest.mark.parametrize("count", [0, 1, 4])
def test_distinct_draws_a_traced_count_of_integers(count):
    draw = jax.jit(jax.vmap(lambda key, n: episodes.distinct(key, 6, 4, n), in_axes=(0, None)))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 3000), count))
    assert drawn.shape == (3000, 4)
    assert (drawn[:, count:] == -1).all()
    assert all(len(set(row)) == count for row in drawn[:, :count].tolist())
    for place in range(count):
        assert chi_square(np.bincount(drawn[:, place], minlength=6)) < CHI_SQUARE_999[5]


def test_the_plans_of_a_step_are_those_of_its_tasks():
    episode = Episode(num_tasks=3, way=2, shot=1, query=2, rotate=True)
    starts, sizes, key = jnp.array([0, 5, 9]), jnp.array([5, 4, 6]), jax.random.key(3)
    planned = jax.jit(episodes.plan_step, static_argnums=0)(episode, starts, sizes, key)
    plan = jax.jit(lambda k: episodes.plan(k, starts, sizes, way=2, shot=1, query=2, rotate=True))
    for i, task_key in enumerate(jax.random.split(key, 3)):
        alone = plan(task_key)
        np.testing.assert_array_equal(planned.examples[i], alone.examples)
        np.testing.assert_array_equal(planned.rotations[i], alone.rotations)


def test_to_tasks_rotates_counterclockwise_and_orders_by_class():
    episode = Episode(num_tasks=9, way=2, shot=1, query=1, rotate=True, classes=True)
    image = np.arange(4, dtype=np.uint8).reshape(2, 2, 1)
    images = jnp.asarray(np.tile(image, (1, 2, 2, 1, 1, 1)))  # one task: fewer than num_tasks
    plans = episodes.Plan(jnp.array([[[7, 5], [2, 0]]]), jnp.array([[1, 2]]))
    keys = jax.random.split(jax.random.key(0), 1)
    task = episodes.to_tasks(episode, jnp.array([0, 3, 6]), plans, images, keys)
    for batch in task:
        assert batch["targets"].tolist() == [[0, 1]]
        turned = np.rint(np.asarray(batch["inputs"])[0, ..., 0] * 255)
        np.testing.assert_array_equal(turned[0], np.rot90(image[..., 0], 1))
        np.testing.assert_array_equal(turned[1], np.rot90(image[..., 0], 2))
    assert task.support["classes"].tolist() == [[2, 0]]
    assert task.query["classes"].tolist() == [[1, 0]]


def test_checked_settings_are_ints_and_compare_equal():
    counts = {"num_tasks": np.int64(2), "way": np.int32(3), "shot": 1, "query": np.int16(2)}
    checked = episodes.checked(Episode(**counts), pool_of([5, 4, 6]))
    assert checked == Episode(num_tasks=2, way=3, shot=1, query=2)
    assert {type(getattr(checked, name)) for name in counts} == {int}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"way": 4}, ValueError, "way=4 is more than the 3 classes there are"),
        ({"shot": 3, "query": 2}, ValueError, r"shot \+ query = 3 \+ 2 .* 'class 1' has 4 images"),
        ({"way": 0}, ValueError, "way must be an integer, 1 or more; got 0"),
        ({"shot": 0}, ValueError, "shot must be an integer, 1 or more; got 0"),
        ({"query": -1}, ValueError, "query must be an integer, 1 or more; got -1"),
        ({"num_tasks": 0}, ValueError, "num_tasks must be an integer, 1 or more; got 0"),
        ({"shot": 1.0}, TypeError, r"shot must be an integer, 1 or more; got 1\.0"),
        ({"augment": Augment(crop=2)}, ValueError, "crop must be from 0 to 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(changed, error, message):
    settings = {"num_tasks": 1, "way": 2, "shot": 1, "query": 1} | changed
    with pytest.raises(error, match=message):
        episodes.checked(Episode(**settings), pool_of([5, 4, 6]))


def test_rotation_needs_square_images():
    pool = pools.from_arrays(np.zeros((4, 2, 3, 1), np.uint8), [0, 0, 1, 1], ["a", "b"])
    episode = Episode(num_tasks=1, way=2, shot=1, query=1, rotate=True)
    with pytest.raises(ValueError, match=r"rotate=True needs square images; got \(2, 3\)"):
        episodes.checked(episode, pool)
