"""Episodes with a varying number of classes and shots, as in Meta-Dataset, padded to one shape."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmaml.checks import check_count
from jaxmaml.data import augmentation, episodes
from jaxmaml.data.augmentation import NONE, Augment
from jaxmaml.data.pools import Pool
from jaxmaml.types import Array, Task


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class VariableEpisode:
    """The settings that all episodes of a source share; static, so that `jit` compiles once.

    Attributes:
        num_tasks: tasks per step.
        min_way, max_way: the number of classes is uniform between these.
        max_query: the most query examples per class.
        max_support: the most support examples per task.
        max_contribution: the most examples by which a class adds to the size of the support.
        max_shot: the most support examples per class.
        augment: changes of the pixels, and their scaling.

    Example:
        >>> episode = VariableEpisode(min_way=2, max_way=5, max_shot=3)
        >>> episode.max_support
        500
    """

    num_tasks: int = 1
    min_way: int = 5
    max_way: int = 50
    max_query: int = 10
    max_support: int = 500
    max_contribution: int = 100
    max_shot: int = 500
    augment: Augment = NONE


class Composition(NamedTuple):
    """The classes of an episode, and how many examples of each there are.

    Attributes:
        classes: int32 `[max_way]`, distinct classes. Only the first `way` are in the episode.
        way: int32 `[]`, the number of classes.
        query: int32 `[max_way]`, the query examples of each class; 0 beyond `way`.
        shots: int32 `[max_way]`, the support examples of each class; 0 beyond `way`.

    Example:
        >>> zeros = jnp.zeros(50, jnp.int32)
        >>> Composition(classes=jnp.arange(50), way=jnp.int32(0), query=zeros, shots=zeros).shots.shape
        (50,)
    """

    classes: Array
    way: Array
    query: Array
    shots: Array


class _Keys(NamedTuple):
    """The PRNG keys of one task, one for each use."""

    way: Array
    classes: Array
    shots: Array
    examples: Array
    pixels: Array


def sampler(
    pool: Pool,
    *,
    num_tasks: int,
    max_way: int = 50,
    max_query: int = 10,
    max_support: int = 500,
    max_contribution: int = 100,
    max_shot: int | None = None,
    min_way: int = 5,
    augment: Augment = NONE,
) -> jax.tree_util.Partial:
    """Returns a source of tasks of varying way and shot: a traceable `key -> tasks`.

    The sampling, and the defaults, are those of Triantafillou et al. 2020 (arXiv 1903.03096),
    section 3.2 and appendix, without their class hierarchies; see `composition`.

    Every task is padded to one shape. A batch's "weights" are 1 for an example and 0 for padding;
    the losses, metrics and networks of `jaxmaml.nn` respect them. The inputs of the padding are
    arbitrary images of the pool.

    Args:
        pool: the images of one split.
        num_tasks: tasks per call.
        max_way: the most classes per task; if the pool has fewer, all of them.
        max_query: the most query examples per class.
        max_support: the most support examples per task.
        max_contribution: the most examples by which a class adds to the size of the support. It
            does not bound the shots: a class can have several hundred.
        max_shot: the most support examples per class. Defaults to no bound of its own, as
            published; a small one makes tasks of many classes smaller.
        min_way: the fewest classes per task.
        augment: changes of the pixels, and their scaling.

    Returns:
        A function of a PRNG key. The support of its `Task` is `{"inputs": float32 [num_tasks,
        num_support, H, W, C], "targets": int32 [num_tasks, num_support], "weights": float32 like
        targets}`, with the classes one after the other and the padding at the end. `num_support` is
        `max_support`, or less if the pool or `max_shot` allow no more. The query is the same with
        `max_way * max_query` rows, in which each class has `max_query` with padding after each.

    Raises:
        TypeError: a count is not an integer.
        ValueError: a count is less than 1, there are fewer classes than `min_way`, `min_way`
            exceeds `max_way`, `max_support` is less than `max_way`, or a class has fewer than two
            images.

    Example:
        >>> from jaxmaml.data import pools
        >>> pool = pools.from_arrays(np.zeros((40, 8, 8, 1), np.uint8), np.arange(40) % 4, "abcd")
        >>> sample = sampler(pool, num_tasks=3, min_way=2, max_way=4, max_shot=5)
        >>> tasks = jax.jit(sample)(jax.random.key(0))
        >>> tasks.support["weights"].shape, tasks.query["inputs"].shape
        ((3, 20), (3, 40, 8, 8, 1))
    """
    episode = VariableEpisode(
        num_tasks=num_tasks, min_way=min_way, max_way=max_way, max_query=max_query,
        max_support=max_support, max_contribution=max_contribution,
        max_shot=max_support if max_shot is None else max_shot, augment=augment,
    )  # fmt: skip
    episode = _checked(episode, pool)
    return jax.tree_util.Partial(_sample, pool, episode, _Rows.of(episode, np.asarray(pool.sizes)))


def composition(episode: VariableEpisode, sizes: Any, key: Array) -> Composition:
    """Draws the classes of an episode, and how many examples of each there are.

    - The way is uniform in `min_way..max_way`.
    - The query has the same number of examples of each class: half of the smallest class chosen,
      rounded down, at most `max_query`.
    - The size of the support is the sum over the classes of `ceil(b * c)`, at most `max_support`: b
      is uniform in (0, 1] and the same for all classes, and c is the number of examples that the
      query leaves, at most `max_contribution`.
    - Each class has one support example. The classes share the rest in proportion to their sizes
      times exp(a), rounded down, with a uniform in [log 0.5, log 2) for each class; a class has no
      more than the query leaves, and no more than `max_shot`.

    Args:
        episode: the settings. They are not checked: `max_way` must not exceed `len(sizes)`.
        sizes: int32 `[num_classes]`, the number of images of each class, 2 or more.
        key: a PRNG key.

    Example:
        >>> episode = VariableEpisode(min_way=2, max_way=3)
        >>> drawn = composition(episode, jnp.array([20, 8, 12, 30]), jax.random.key(0))
        >>> drawn.query.shape, bool((drawn.shots > 0).sum() == drawn.way)
        ((3,), True)
    """
    return _composition(episode, jnp.asarray(sizes, jnp.int32), _keys(key))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
    """The static sizes of the arrays of a task.

    Attributes:
        support: the rows of the support, padding included.
        drawn: the most examples that are drawn of one class.
    """

    support: int
    drawn: int

    @classmethod
    def of(cls, episode: VariableEpisode, sizes: np.ndarray) -> "_Rows":
        # One class has at least one query example, and each of the others one of the support.
        most = min(episode.max_shot, episode.max_support - episode.min_way + 1)
        shots = np.sort(np.minimum(sizes - 1, most))[-episode.max_way :]
        return cls(
            support=min(episode.max_support, int(shots.sum())),
            drawn=min(int(shots.max()) + episode.max_query, int(sizes.max())),
        )


def _checked(episode: VariableEpisode, pool: Pool) -> VariableEpisode:
    # The counts.
    names = ("num_tasks", "min_way", "max_way", "max_query", "max_support", "max_contribution")
    counts = {name: check_count(name, getattr(episode, name)) for name in (*names, "max_shot")}
    if counts["min_way"] > counts["max_way"]:
        raise ValueError(f"min_way={episode.min_way} must be at most max_way={episode.max_way}")

    # What the pool allows.
    sizes = np.asarray(pool.sizes)
    if counts["min_way"] > len(sizes):
        raise ValueError(
            f"min_way={episode.min_way} is more than the {len(sizes)} classes there are"
        )
    episode = dataclasses.replace(episode, **counts | {"max_way": min(episode.max_way, len(sizes))})
    if sizes.min() < 2:
        raise ValueError(
            f"class {pool.names[sizes.argmin()]!r} has one image: support and query need one each"
        )
    if episode.max_support < episode.max_way:
        raise ValueError(
            f"max_support={episode.max_support} must be at least max_way={episode.max_way}"
        )
    augmentation.check(episode.augment, pool.shape)
    return episode


def _keys(key: Array) -> _Keys:
    return _Keys(*jax.random.split(key, len(_Keys._fields)))


def _sample(pool: Pool, episode: VariableEpisode, rows: _Rows, key: Array) -> Task:
    keys = jax.random.split(key, episode.num_tasks)
    return jax.vmap(functools.partial(_to_task, pool, episode, rows))(keys)


def _to_task(pool: Pool, episode: VariableEpisode, rows: _Rows, key: Array) -> Task:
    # Distinct examples of each class: the first `query` are its queries, the next ones its shots.
    keys = _keys(key)
    drawn = _composition(episode, pool.sizes, keys)
    chosen = jax.vmap(functools.partial(episodes.distinct, most=rows.drawn))(
        jax.random.split(keys.examples, episode.max_way),
        pool.sizes[drawn.classes],
        count=drawn.query + drawn.shots,
    )
    of_class = jax.vmap(lambda slots, index: slots.at[index].get(mode="clip"))
    images_of = pool.starts[drawn.classes][:, None] + jnp.maximum(chosen, 0)

    # The query, one class after the other, with padding after each.
    within = jnp.broadcast_to(jnp.arange(episode.max_query), (episode.max_way, episode.max_query))
    query_rows = of_class(images_of, within).reshape(-1)
    query_slots = jnp.repeat(jnp.arange(episode.max_way, dtype=jnp.int32), episode.max_query)
    in_query = (within < drawn.query[:, None]).reshape(-1)

    # The support, one class after the other, with padding at the end.
    ends = jnp.cumsum(drawn.shots)
    place = jnp.arange(rows.support)
    slots = jnp.searchsorted(ends, place, side="right").astype(jnp.int32)
    slots = jnp.minimum(slots, episode.max_way - 1)
    index = drawn.query[slots] + place - (ends - drawn.shots)[slots]
    support_rows = images_of.at[slots, index].get(mode="clip")

    # One call changes the pixels of all images, each in its own way.
    all_rows = jnp.concatenate([support_rows, query_rows])
    images = augmentation.apply(episode.augment, pool.images[all_rows], keys.pixels)
    return Task(
        _batch(images[: rows.support], slots, place < ends[-1]),
        _batch(images[rows.support :], query_slots, in_query),
    )


def _batch(images: Array, targets: Array, is_example: Array) -> dict[str, Array]:
    return {"inputs": images, "targets": targets, "weights": is_example.astype(jnp.float32)}


def _composition(episode: VariableEpisode, sizes: Array, keys: _Keys) -> Composition:
    way = jax.random.randint(keys.way, (), episode.min_way, episode.max_way + 1)
    classes = episodes.distinct(keys.classes, len(sizes), episode.max_way)
    is_class = jnp.arange(episode.max_way) < way
    sizes = sizes[classes]
    query = _query_size(episode, sizes, is_class)
    shots = _shots(episode, keys.shots, sizes, is_class, query)
    return Composition(classes, way, jnp.where(is_class, query, 0), shots)


def _query_size(episode: VariableEpisode, sizes: Array, is_class: Array) -> Array:
    smallest = jnp.min(jnp.where(is_class, sizes, jnp.iinfo(jnp.int32).max))
    return jnp.minimum(episode.max_query, smallest // 2)


def _shots(
    episode: VariableEpisode, key: Array, sizes: Array, is_class: Array, query: Array
) -> Array:
    """Returns the number of support examples of each class: at least 1, at most what is left."""
    # The size of the whole support.
    fraction_key, share_key = jax.random.split(key)
    left = jnp.where(is_class, sizes - query, 0)
    fraction = 1 - jax.random.uniform(fraction_key)  # in (0, 1]
    wanted = jnp.sum(jnp.ceil(fraction * jnp.minimum(left, episode.max_contribution)))
    total = jnp.minimum(wanted, episode.max_support)

    # Each class has one example; the classes share the rest.
    logs = jax.random.uniform(share_key, sizes.shape, minval=math.log(0.5), maxval=math.log(2))
    share = jnp.exp(logs) * sizes * is_class
    beyond_one = total - jnp.sum(is_class)
    shots = jnp.floor(share / jnp.sum(share) * beyond_one).astype(jnp.int32) + 1
    return jnp.minimum(jnp.minimum(shots, left), episode.max_shot * is_class)
