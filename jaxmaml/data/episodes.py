"""Episodes: drawn as indices, which serve images anywhere, and made into tasks on the device."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxmaml.checks import check_count
from jaxmaml.data import augmentation
from jaxmaml.data.augmentation import Augment
from jaxmaml.types import Array, Task


class ImagesByClass(Protocol):
    """The images of one split, with rows sorted by class: a `Pool` or `Images`.

    Attributes:
        starts: int32 `[num_classes]`, the first row of each class.
        sizes: int32 `[num_classes]`, the number of images of each class.
        names: the name of each class.
        shape: (height, width, channels) of an image.

    Example:
        >>> from jaxmaml.data import pools
        >>> pixels = np.zeros((2, 8, 8, 1), np.uint8)
        >>> images: ImagesByClass = pools.from_arrays(pixels, [0, 1], "ab")
        >>> images.shape
        (8, 8, 1)
    """

    @property
    def starts(self) -> Any: ...
    @property
    def sizes(self) -> Any: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class Plan(NamedTuple):
    """One episode as indices.

    Attributes:
        examples: int32 `[way, shot + query]`, rows of the images, those of the support first.
        rotations: int32 `[way]`, the counterclockwise quarter turns of each class slot, 0..3.

    Example:
        >>> planned = Plan(examples=jnp.array([[3, 1]]), rotations=jnp.array([0]))
        >>> planned.examples.shape
        (1, 2)
    """

    examples: Array
    rotations: Array


class TaskKeys(NamedTuple):
    """The PRNG keys of one task, one for each use. `task_keys` makes them.

    Attributes:
        classes: draws the classes.
        examples: draws the examples of the classes.
        rotations: draws the rotation of each class slot.
        pixels: draws the changes of the pixels, for `augmentation.apply`.

    Example:
        >>> task_keys(jax.random.key(0)).pixels.shape
        ()
    """

    classes: Array
    examples: Array
    rotations: Array
    pixels: Array


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Episode:
    """The settings that all episodes of a source share.

    The settings are static in a pytree. Equal settings compare equal, so `jit` compiles once.

    Attributes:
        num_tasks: tasks per step.
        way: classes per task.
        shot: support examples per class.
        query: query examples per class.
        rotate: whether each class slot turns by a random multiple of 90 degrees.
        augment: further changes of the pixels, and their scaling.
        classes: whether batches also have "classes", the class of each example among all classes
            of the source.

    Example:
        >>> Episode(num_tasks=4, way=5, shot=1, query=15).rotate
        False
    """

    num_tasks: int
    way: int
    shot: int
    query: int
    rotate: bool = False
    augment: Augment = augmentation.NONE
    classes: bool = False


def checked(episode: Episode, images: ImagesByClass) -> Episode:
    """Returns the settings with counts of type int, if the images allow such episodes.

    Args:
        episode: the settings.
        images: the images of one split.

    Raises:
        TypeError: a count is not an integer.
        ValueError: a count is less than 1, `way` exceeds the number of classes, `shot + query`
            exceeds the size of the smallest class, `rotate` with images that are not square, or
            augmentation that does not suit the images.

    Example:
        >>> from jaxmaml.data import pools
        >>> pool = pools.from_arrays(np.zeros((4, 8, 8, 1), np.uint8), [0, 0, 1, 1], "ab")
        >>> checked(Episode(num_tasks=1, way=3, shot=1, query=1), pool)
        Traceback (most recent call last):
        ValueError: way=3 is more than the 2 classes there are
    """
    # The counts.
    names = ("num_tasks", "way", "shot", "query")
    counts = {name: check_count(name, getattr(episode, name)) for name in names}
    episode = dataclasses.replace(episode, **counts)

    # What the images allow.
    sizes = np.asarray(images.sizes)
    if episode.way > len(sizes):
        raise ValueError(f"way={episode.way} is more than the {len(sizes)} classes there are")
    if episode.shot + episode.query > sizes.min():
        raise ValueError(
            f"shot + query = {episode.shot} + {episode.query} is more than the smallest class has: "
            f"{images.names[sizes.argmin()]!r} has {sizes.min()} images"
        )
    if episode.rotate and images.shape[0] != images.shape[1]:
        raise ValueError(f"rotate=True needs square images; got {tuple(images.shape[:2])}")
    augmentation.check(episode.augment, images.shape)
    return episode


def task_keys(key: Array) -> TaskKeys:
    """Splits the key of a task, once and by name.

    The plan and the pixels of a task may be made at different times and places. Both take their
    keys from here: `fold_in(key, i)` equals `split(key, n)[i]`, so that keys derived in two ways
    could be equal.

    Args:
        key: the PRNG key of the task.

    Example:
        >>> keys = task_keys(jax.random.key(0))
        >>> len({tuple(jax.random.key_data(key).tolist()) for key in keys})
        4
    """
    return TaskKeys(*jax.random.split(key, len(TaskKeys._fields)))


def plan(
    key: Array, starts: Any, sizes: Any, *, way: int, shot: int, query: int, rotate: bool
) -> Plan:
    """Draws one episode: classes and examples without replacement, a rotation per class slot.

    No pixels are read, so that the same plan serves images on the device and on disk. All ordered
    choices of classes are equally likely, whatever the sizes of the classes, and so are all ordered
    choices of examples within a class.

    The sizes may be traced, so they are not checked: `way` must not exceed `len(sizes)`, and
    `shot + query` must not exceed the smallest size.

    Args:
        key: the PRNG key of the task; the same key gives the same plan.
        starts: int32 `[num_classes]`, the first row of each class.
        sizes: int32 `[num_classes]`, the number of rows of each class.
        way: classes per task.
        shot: support examples per class.
        query: query examples per class.
        rotate: whether each class slot turns by a random multiple of 90 degrees.

    Returns:
        A `Plan`.

    Example:
        >>> drawn = plan(jax.random.key(0), [0, 5], [5, 9], way=2, shot=1, query=3, rotate=False)
        >>> drawn.examples.shape
        (2, 4)
    """
    starts, sizes = jnp.asarray(starts, jnp.int32), jnp.asarray(sizes, jnp.int32)
    keys = task_keys(key)
    classes = distinct(keys.classes, len(sizes), way)
    offsets = jax.vmap(partial(distinct, most=shot + query))(
        jax.random.split(keys.examples, way), sizes[classes]
    )
    turns = 4 if rotate else 1
    rotations = jax.random.randint(keys.rotations, (way,), 0, turns, jnp.int32)
    return Plan(starts[classes][:, None] + offsets, rotations)


def plan_step(episode: Episode, starts: Any, sizes: Any, key: Array) -> Plan:
    """Draws the plans of one step.

    Args:
        episode: the settings.
        starts, sizes: int32 `[num_classes]`, as in `plan`.
        key: the PRNG key of the step.

    Returns:
        A `Plan` with leaves `[num_tasks, ...]`.

    Example:
        >>> episode = Episode(num_tasks=4, way=2, shot=1, query=3)
        >>> draw = jax.jit(plan_step, static_argnums=0)
        >>> draw(episode, jnp.array([0, 5]), jnp.array([5, 9]), jax.random.key(0)).examples.shape
        (4, 2, 4)
    """
    return plan_tasks(episode, starts, sizes, jax.random.split(key, episode.num_tasks))


def plan_tasks(episode: Episode, starts: Any, sizes: Any, keys: Array) -> Plan:
    """Draws the plans of tasks from their keys.

    Args:
        episode: the settings.
        starts, sizes: int32 `[num_classes]`, as in `plan`.
        keys: the PRNG keys of the tasks, `[num_tasks]`.

    Returns:
        A `Plan` with leaves `[num_tasks, ...]`.

    Example:
        >>> episode = Episode(num_tasks=4, way=2, shot=1, query=3)
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> plan_tasks(episode, jnp.array([0, 5]), jnp.array([5, 9]), keys).examples.shape
        (2, 2, 4)
    """
    counts = {name: getattr(episode, name) for name in ("way", "shot", "query", "rotate")}
    return jax.vmap(lambda key: plan(key, starts, sizes, **counts))(keys)


def to_tasks(episode: Episode, starts: Array, plans: Plan, images: Array, keys: Array) -> Task:
    """Makes tasks of the planned images: rotated, augmented and scaled.

    Args:
        episode: the settings. The arrays may hold fewer than its `num_tasks`: a process may have
            only some of the tasks.
        starts: int32 `[num_classes]`, the first row of each class.
        plans: leaves `[num_tasks, ...]`.
        images: uint8 `[num_tasks, way, shot + query, H, W, C]`, the planned rows.
        keys: the PRNG keys of the tasks, `[num_tasks]`, from which their plans were drawn.

    Returns:
        The tasks, as `pools.sampler` describes them.

    Example:
        >>> episode = Episode(num_tasks=4, way=2, shot=1, query=3)
        >>> rows, starts, sizes = jnp.zeros((14, 8, 8, 1), jnp.uint8), jnp.array([0, 5]), [5, 9]
        >>> @jax.jit
        ... def sample(key):
        ...     plans = plan_step(episode, starts, sizes, key)
        ...     keys = jax.random.split(key, 4)
        ...     return to_tasks(episode, starts, plans, rows[plans.examples], keys)
        >>> sample(jax.random.key(0)).query["inputs"].shape
        (4, 6, 8, 8, 1)
    """
    return jax.vmap(partial(_to_task, episode, starts))(plans, images, keys)


def distinct(key: Array, size: int | Array, most: int, count: int | Array | None = None) -> Array:
    """Draws distinct integers below `size`, in random order.

    Floyd's algorithm (Bentley & Floyd 1987, "A sample of brilliance"). Its work depends on `most`
    only, so classes of unequal size need neither padding nor a sort of the largest one.

    Args:
        key: a PRNG key.
        size: the integers are in 0..size-1; may be traced.
        most: the length of the result.
        count: the number of integers drawn, at most `most`; may be traced. Defaults to `most`.

    Returns:
        int32 `[most]`: `count` integers, then -1.

    Example:
        >>> sorted(distinct(jax.random.key(0), size=4, most=4).tolist())
        [0, 1, 2, 3]
    """
    # Step i picks one of the integers up to last[i], or last[i] itself if the pick is taken.
    pick_key, order_key = jax.random.split(key)
    index = jnp.arange(most, dtype=jnp.int32)
    last = size - (most if count is None else count) + index
    picks = jax.random.randint(pick_key, (most,), 0, last + 1, jnp.int32)

    def step(i: Array, chosen: Array) -> Array:
        is_taken = jnp.any(chosen == picks[i])
        return chosen.at[i].set(jnp.where(is_taken, last[i], picks[i]))

    chosen = jax.lax.fori_loop(0, most, step, jnp.full(most, -1, jnp.int32))

    # The set is uniform but its order is not: without this, support and query would differ.
    if count is None:
        return jax.random.permutation(order_key, chosen)
    chosen = jnp.where(index < count, chosen, -1)
    order = jnp.where(index < count, jax.random.uniform(order_key, (most,)), 2.0)
    return chosen[jnp.argsort(order)]


def _to_task(episode: Episode, starts: Array, planned: Plan, images: Array, key: Array) -> Task:
    if episode.rotate:
        images = jax.vmap(_rotate)(images, planned.rotations)
    pixels_key = task_keys(key).pixels
    examples = {"inputs": augmentation.apply(episode.augment, images, pixels_key)}
    if episode.classes:
        # The class of a row is the last one that starts at or before it.
        following = jnp.searchsorted(starts, planned.examples, side="right")
        examples["classes"] = following.astype(jnp.int32) - 1
    return Task(
        _batch({name: leaf[:, : episode.shot] for name, leaf in examples.items()}),
        _batch({name: leaf[:, episode.shot :] for name, leaf in examples.items()}),
    )


def _rotate(images: Array, turns: Array) -> Array:
    """Turns `[..., H, W, C]` counterclockwise by a traced number of quarter turns.

    There are two selects, one per bit of `turns`: under vmap a switch would compute all four cases.
    """
    images = jnp.where(turns % 2 == 1, jnp.rot90(images, axes=(-3, -2)), images)
    return jnp.where(turns >= 2, images[..., ::-1, ::-1, :], images)


def _batch(examples: dict[str, Array]) -> dict[str, Array]:
    """Returns a batch ordered by class of leaves `[way, num_examples, ...]`, with targets."""
    way, num_examples = examples["inputs"].shape[:2]
    flat = {name: leaf.reshape(-1, *leaf.shape[2:]) for name, leaf in examples.items()}
    return {**flat, "targets": jnp.repeat(jnp.arange(way, dtype=jnp.int32), num_examples)}
