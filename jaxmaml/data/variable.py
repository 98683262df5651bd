"""Episodes with a varying number of classes and shots, as in Meta-Dataset, padded to one shape."""

import dataclasses
import functools
import math
from typing import Any

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
        max_shot: the most support examples per class.
        max_query: the most query examples per class.
        max_support: the most support examples per task.
        augment: changes of the pixels, and their scaling.

    Example:
        >>> episode = VariableEpisode(
        ...     num_tasks=4, min_way=2, max_way=5, max_shot=3, max_query=10, max_support=9,
        ...     augment=NONE,
        ... )
        >>> episode.max_support
        9
    """

    num_tasks: int
    min_way: int
    max_way: int
    max_shot: int
    max_query: int
    max_support: int
    augment: Augment


def sampler(
    pool: Pool,
    *,
    num_tasks: int,
    max_way: int,
    max_shot: int,
    max_query: int = 10,
    max_support: int = 500,
    min_way: int = 2,
    augment: Augment = NONE,
) -> jax.tree_util.Partial:
    """Returns a source of tasks of varying way and shot: a traceable `key -> tasks`.

    The sampling follows Triantafillou et al. 2020 (arXiv 1903.03096), section 3.2.1, without their
    class hierarchies:

    - The way is uniform in `min_way..max_way`.
    - The query has the same number of examples of each class: half of the smallest class chosen,
      at most `max_query`.
    - The support has a fraction, uniform in (0, 1], of the remaining examples, at most
      `max_support`. The classes share it in proportion to their sizes times exp(a), with a uniform
      in [log 0.5, log 2). Each class has at least one example and at most `max_shot`.

    Every task is padded to one shape. A batch's "weights" are 1 for an example and 0 for padding;
    the losses, metrics and networks of `jaxmaml.nn` respect them. The inputs of the padding are
    arbitrary images of the pool.

    Args:
        pool: the images of one split.
        num_tasks: tasks per call.
        max_way: the most classes per task.
        max_shot: the most support examples per class.
        max_query: the most query examples per class.
        max_support: the most support examples per task.
        min_way: the fewest classes per task.
        augment: changes of the pixels, and their scaling.

    Returns:
        A function of a PRNG key. The support of its `Task` is `{"inputs": float32 [num_tasks,
        max_way * max_shot, H, W, C], "targets": int32 [num_tasks, max_way * max_shot], "weights":
        float32 like targets}`; the query is the same with `max_query`.

    Raises:
        TypeError: a count is not an integer.
        ValueError: a count is less than 1, `max_way` exceeds the number of classes or is less than
            `min_way`, `max_support` is less than `max_way`, or a class has fewer than two images.

    Example:
        >>> from jaxmaml.data import pools
        >>> pool = pools.from_arrays(np.zeros((40, 8, 8, 1), np.uint8), np.arange(40) % 4, "abcd")
        >>> sample = sampler(pool, num_tasks=3, max_way=4, max_shot=5)
        >>> tasks = jax.jit(sample)(jax.random.key(0))
        >>> tasks.support["weights"].shape, tasks.query["inputs"].shape
        ((3, 20), (3, 40, 8, 8, 1))
    """
    episode = VariableEpisode(
        num_tasks=num_tasks, min_way=min_way, max_way=max_way, max_shot=max_shot,
        max_query=max_query, max_support=max_support, augment=augment,
    )  # fmt: skip
    return jax.tree_util.Partial(_sample, pool, _checked(episode, pool))


def _checked(episode: VariableEpisode, pool: Pool) -> VariableEpisode:
    # The counts.
    names = ("num_tasks", "min_way", "max_way", "max_shot", "max_query", "max_support")
    counts = {name: check_count(name, getattr(episode, name)) for name in names}
    episode = dataclasses.replace(episode, **counts)

    # What the pool allows.
    sizes = np.asarray(pool.sizes)
    if not episode.min_way <= episode.max_way <= len(sizes):
        raise ValueError(
            f"min_way={episode.min_way} must be at most max_way={episode.max_way}, and max_way at "
            f"most the {len(sizes)} classes there are"
        )
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


def _sample(pool: Pool, episode: VariableEpisode, key: Array) -> Task:
    keys = jax.random.split(key, episode.num_tasks)
    return jax.vmap(functools.partial(_to_task, pool, episode))(keys)


def _to_task(pool: Pool, episode: VariableEpisode, key: Array) -> Task:
    # The classes, and how many examples of each are drawn.
    way_key, class_key, shot_key, example_key = jax.random.split(key, 4)
    way = jax.random.randint(way_key, (), episode.min_way, episode.max_way + 1)
    classes = episodes.distinct(class_key, len(pool.names), episode.max_way)
    is_class = jnp.arange(episode.max_way) < way
    sizes = pool.sizes[classes]
    query = _query_size(episode, sizes, is_class)
    shots = _shots(episode, shot_key, sizes, is_class, query)

    # The examples, of classes that are padding too.
    most = episode.max_shot + episode.max_query
    draw = functools.partial(episodes.distinct, most=most)
    chosen = jax.vmap(draw)(
        jax.random.split(example_key, episode.max_way), sizes, count=shots + query
    )
    rows = pool.starts[classes][:, None] + jnp.maximum(chosen, 0)
    images = augmentation.apply(episode.augment, pool.images[rows], key)

    # The first `query` examples of a class are its queries, the next ones its shots.
    at = jnp.arange(most)
    in_query = is_class[:, None] & (at < query)
    in_support = is_class[:, None] & (at >= query) & (at < (query + shots)[:, None])
    return Task(
        _padded(images, in_support, episode.max_shot), _padded(images, in_query, episode.max_query)
    )


def _query_size(episode: VariableEpisode, sizes: Array, is_class: Array) -> Array:
    smallest = jnp.min(jnp.where(is_class, sizes, jnp.iinfo(jnp.int32).max))
    return jnp.minimum(episode.max_query, smallest // 2)


def _shots(
    episode: VariableEpisode, key: Array, sizes: Array, is_class: Array, query: Array
) -> Array:
    """Returns the number of support examples of each class: at least 1, at most what is left."""
    # The size of the whole support.
    fraction_key, share_key = jax.random.split(key)
    left = jnp.where(is_class, jnp.minimum(sizes - query, episode.max_shot), 0)
    fraction = 1 - jax.random.uniform(fraction_key)  # in (0, 1]
    wanted = jnp.sum(jnp.where(is_class, jnp.ceil(fraction * left), 0))
    total = jnp.minimum(wanted, episode.max_support)

    # Each class has one example; the classes share the rest.
    logs = jax.random.uniform(share_key, sizes.shape, minval=math.log(0.5), maxval=math.log(2))
    share = jnp.exp(logs) * sizes * is_class
    beyond_one = jnp.maximum(total - jnp.sum(is_class), 0)
    shots = jnp.floor(share / jnp.sum(share) * beyond_one).astype(jnp.int32) + 1
    return jnp.where(is_class, jnp.minimum(shots, left), 0)


def _padded(images: Array, chosen: Array, most: int) -> dict[str, Any]:
    """Returns a batch of `most` images per class, the chosen ones first, with their weights."""
    order = jnp.argsort(~chosen, axis=1, stable=True)[:, :most]
    taken = jax.vmap(lambda of_class, index: of_class[index])(images, order)
    way = len(images)
    return {
        "inputs": taken.reshape(way * most, *images.shape[2:]),
        "targets": jnp.repeat(jnp.arange(way, dtype=jnp.int32), most),
        "weights": jnp.take_along_axis(chosen, order, axis=1).reshape(-1).astype(jnp.float32),
    }
