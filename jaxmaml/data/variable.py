"""Episodes of a varying number of classes and shots, in the manner of Meta-Dataset, padded."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmaml.data import augment as augmenting
from jaxmaml.data import episodes
from jaxmaml.data.augment import Augment
from jaxmaml.data.pools import Pool
from jaxmaml.types import Array, Task


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class VariableEpisode:
    """What every episode of a source is like; static, so that jit compiles once.

    Attributes:
        num_tasks: tasks per step.
        min_way, max_way: the number of classes is uniform between these.
        max_shot: most support examples of a class.
        max_query: most query examples of a class.
        max_support: most support examples of a task.
        augment: what is done to the pixels.
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
    augment: Augment = augmenting.NONE,
) -> jax.tree_util.Partial:
    """A jittable source of tasks of varying way and shot: `key -> Task`.

    After Triantafillou et al. 2020 (arXiv 1903.03096), section 3.2.1, without their class
    hierarchies: the way is uniform in `min_way..max_way`; the query takes as many examples of each
    class as half of the smallest class chosen, at most `max_query`; a fraction uniform in (0, 1] of
    what is left, at most `max_support` in all, is the support, shared among the classes in
    proportion to their sizes times exp(a), a uniform in [log 0.5, log 2), with one example at least.

    Every task is padded to one shape. A batch's "weights" are 1 for an example and 0 for padding;
    losses, metrics and networks of `jaxmaml.nn` heed them. Padding holds images of the class slot,
    or of any class, and counts nowhere.

    Args:
        pool: the classes of one split.
        num_tasks: tasks per call.
        min_way, max_way: fewest and most classes of a task.
        max_shot: most support examples of a class.
        max_query: most query examples of a class.
        max_support: most support examples of a task.
        augment: what is done to the pixels.

    Returns:
        A function of a PRNG key. Its `Task` has as support `{"inputs": float32 [num_tasks,
        max_way*max_shot, H, W, C], "targets": int32 [num_tasks, max_way*max_shot], "weights":
        float32 like targets}`, and the same with `max_query` as query.

    Raises:
        ValueError: counts that are not positive, more classes than the pool has, a class of fewer
            than two images.

    >>> from jaxmaml.data import pools
    >>> pool = pools.from_arrays(np.zeros((40, 8, 8, 1), np.uint8), np.arange(40) % 4, "abcd")
    >>> tasks = sampler(pool, num_tasks=3, max_way=4, max_shot=5)(jax.random.key(0))
    >>> tasks.support["weights"].shape, tasks.query["inputs"].shape
    ((3, 20), (3, 40, 8, 8, 1))
    """
    episode = VariableEpisode(
        num_tasks=num_tasks, min_way=min_way, max_way=max_way, max_shot=max_shot,
        max_query=max_query, max_support=max_support, augment=augment,
    )  # fmt: skip
    _check(episode, pool)
    return jax.tree_util.Partial(_sample, pool, episode)


def _check(episode: VariableEpisode, pool: Pool) -> None:
    for name in ("num_tasks", "min_way", "max_way", "max_shot", "max_query", "max_support"):
        episodes.check_counts(**{name: getattr(episode, name)})
    sizes = np.asarray(pool.sizes)
    if not episode.min_way <= episode.max_way <= len(sizes):
        raise ValueError(
            f"min_way={episode.min_way} and max_way={episode.max_way} must be in order and at most "
            f"the {len(sizes)} classes there are"
        )
    if sizes.min() < 2:
        raise ValueError(
            f"class {pool.names[sizes.argmin()]!r} has one image: support and query need one each"
        )
    if episode.max_support < episode.max_way:
        raise ValueError(
            f"max_support={episode.max_support} must be at least max_way={episode.max_way}"
        )
    augmenting.check(episode.augment, pool.images.shape[1:])


def _sample(pool: Pool, episode: VariableEpisode, key: Array) -> Task:
    keys = jax.random.split(key, episode.num_tasks)
    return jax.vmap(functools.partial(_task, pool, episode))(keys)


def _task(pool: Pool, episode: VariableEpisode, key: Array) -> Task:
    way_key, class_key, shot_key, example_key = jax.random.split(key, 4)
    way = jax.random.randint(way_key, (), episode.min_way, episode.max_way + 1)
    classes = episodes.distinct(class_key, len(pool.names), episode.max_way)
    is_class = jnp.arange(episode.max_way) < way
    sizes = pool.sizes[classes]
    query = _query_size(episode, sizes, is_class)
    shots = _shots(episode, shot_key, sizes, is_class, query)
    most = episode.max_shot + episode.max_query
    draw = functools.partial(episodes.distinct, most=most)
    chosen = jax.vmap(draw)(
        jax.random.split(example_key, episode.max_way), sizes, count=shots + query
    )
    # Of the examples of a class the first `query` are queries, and the next ones its shots.
    at = jnp.arange(most)
    rows = pool.starts[classes][:, None] + jnp.maximum(chosen, 0)
    images = augmenting.apply(episode.augment, pool.images[rows], key)
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
    """Support examples of each class, at least 1 and at most `max_shot` and what the query leaves."""
    fraction_key, share_key = jax.random.split(key)
    left = jnp.where(is_class, jnp.minimum(sizes - query, episode.max_shot), 0)
    fraction = 1 - jax.random.uniform(fraction_key)  # in (0, 1]
    wanted = jnp.sum(jnp.where(is_class, jnp.ceil(fraction * left), 0))
    total = jnp.minimum(wanted, episode.max_support)
    logs = jax.random.uniform(share_key, sizes.shape, minval=math.log(0.5), maxval=math.log(2))
    share = jnp.exp(logs) * sizes * is_class
    beyond_one = jnp.maximum(total - jnp.sum(is_class), 0)
    shots = jnp.floor(share / jnp.sum(share) * beyond_one).astype(jnp.int32) + 1
    return jnp.where(is_class, jnp.minimum(shots, left), 0)


def _padded(images: Array, chosen: Array, most: int) -> dict[str, Any]:
    """The chosen images of each class first, `most` a class, with weights."""
    order = jnp.argsort(~chosen, axis=1, stable=True)[:, :most]
    taken = jax.vmap(lambda of_class, index: of_class[index])(images, order)
    way = len(images)
    return {
        "inputs": taken.reshape(way * most, *images.shape[2:]),
        "targets": jnp.repeat(jnp.arange(way, dtype=jnp.int32), most),
        "weights": jnp.take_along_axis(chosen, order, axis=1).reshape(-1).astype(jnp.float32),
    }
