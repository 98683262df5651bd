"""Images on the device, grouped by class, from which episodes are sampled inside jit."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmaml.types import Array, Task


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["images", "starts", "sizes"],
    meta_fields=["names"],
)
@dataclasses.dataclass(frozen=True)
class Pool:
    """All images of one split of classes; a split is its own pool, so classes cannot leak.

    Attributes:
        images: uint8 `[num_images, H, W, C]`, rows sorted by class.
        starts: int32 `[num_classes]`, the first row of each class.
        sizes: int32 `[num_classes]`, the number of images of each class; they may differ.
        names: the name of each class, in the same order.
    """

    images: Array
    starts: Array
    sizes: Array
    names: tuple[str, ...]


class Plan(NamedTuple):
    """One episode as indices, wherever its pixels come from.

    Attributes:
        examples: int32 `[way, shot + query]`, rows of the images, the support's first.
        rotations: int32 `[way]`, anticlockwise quarter turns of each class slot, 0..3.
    """

    examples: Array
    rotations: Array


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Episode:
    """The static half of a sampler: equal settings compare equal, so jit compiles them once."""

    num_tasks: int
    way: int
    shot: int
    query: int
    rotate: bool


def from_arrays(images: Any, labels: Any, names: Sequence[str]) -> Pool:
    """Builds a pool, sorting the images by class and keeping their order within a class.

    Args:
        images: uint8 `[num_images, H, W, C]`.
        labels: integers `[num_images]`, each an index into `names`.
        names: distinct class names.

    Returns:
        A `Pool` with `len(names)` classes.

    Raises:
        TypeError: if the images are not uint8 or the labels no integers.
        ValueError: if shapes do not fit, names repeat, a label has no name or a class no image.

    >>> pool = from_arrays(np.zeros((3, 8, 8, 1), np.uint8), [1, 0, 1], ["a", "b"])
    >>> pool.sizes.tolist()
    [1, 2]
    """
    images, labels, names = np.asarray(images), np.asarray(labels), tuple(names)
    _check_arrays(images, labels, names)
    sizes = np.bincount(labels, minlength=len(names))
    if not sizes.all():
        raise ValueError(f"labels: class {names[sizes.argmin()]!r} has no images")
    return Pool(
        images=jnp.asarray(images[np.argsort(labels, kind="stable")]),
        starts=jnp.asarray(np.cumsum(sizes) - sizes, jnp.int32),
        sizes=jnp.asarray(sizes, jnp.int32),
        names=names,
    )


def plan(
    key: Array, starts: Any, sizes: Any, *, way: int, shot: int, query: int, rotate: bool
) -> Plan:
    """Plans one episode: classes and examples without replacement, a rotation per class slot.

    It reads no pixels, so that the same plan serves images on the device and on disk. Each ordered
    choice of classes is equally likely, whatever their sizes, and so is each ordered choice of
    examples within a class. The arguments are not checked here, as sizes may be traced: `way` must
    not exceed `len(sizes)`, nor `shot + query` the smallest size.

    Args:
        key: a PRNG key; the same key gives the same plan.
        starts: int32 `[num_classes]`, the first row of each class.
        sizes: int32 `[num_classes]`, the number of rows of each class.
        way: classes.
        shot: support examples per class.
        query: query examples per class.
        rotate: whether each class slot turns by a random multiple of 90 degrees.

    Returns:
        A `Plan`.

    >>> p = plan(jax.random.key(0), [0, 5], [5, 9], way=2, shot=1, query=3, rotate=False)
    >>> p.examples.shape
    (2, 4)
    """
    starts, sizes = jnp.asarray(starts, jnp.int32), jnp.asarray(sizes, jnp.int32)
    class_key, example_key, rotation_key = jax.random.split(key, 3)
    classes = _distinct(class_key, len(sizes), count=way)
    offsets = jax.vmap(partial(_distinct, count=shot + query))(
        jax.random.split(example_key, way), sizes[classes]
    )
    turns = 4 if rotate else 1
    rotations = jax.random.randint(rotation_key, (way,), 0, turns, jnp.int32)
    return Plan(starts[classes][:, None] + offsets, rotations)


def sampler(
    pool: Pool, *, num_tasks: int, way: int, shot: int, query: int, rotate: bool = False
) -> jax.tree_util.Partial:
    """A jittable source of tasks: `key -> Task`, sampled on the device.

    The result is a pytree that holds the pool. Pass it to a jitted function as an argument, and the
    images are an input of the program and no constant baked into it.

    Args:
        pool: the classes of one split.
        num_tasks: tasks per call.
        way: classes per task.
        shot: support examples per class.
        query: query examples per class.
        rotate: turn each class slot by a random multiple of 90 degrees, as the Omniglot protocol
            of Santoro et al. (2016) does.

    Returns:
        A function of a PRNG key. Its `Task` has `{"inputs": float32 [num_tasks, way*shot, H, W, C]
        in 0..1, "targets": int32 [num_tasks, way*shot]}` as support, and the same with `way*query`
        as query. Examples are ordered by class; targets are the class slots 0..way-1.

    Raises:
        ValueError: for a count that is no positive integer, more classes than the pool has, more
            examples than its smallest class has, or `rotate` with images that are not square.

    >>> pool = from_arrays(np.zeros((40, 8, 8, 1), np.uint8), np.arange(40) % 4, list("abcd"))
    >>> sample = sampler(pool, num_tasks=3, way=2, shot=1, query=5)
    >>> sample(jax.random.key(0)).query["inputs"].shape
    (3, 10, 8, 8, 1)
    """
    check_counts(num_tasks=num_tasks, way=way, shot=shot, query=query)
    _check_fits(pool, way, shot, query)
    if rotate and pool.images.shape[1] != pool.images.shape[2]:
        raise ValueError(f"rotate=True needs square images, got {pool.images.shape[1:3]}")
    return jax.tree_util.Partial(_sample, pool, _Episode(num_tasks, way, shot, query, rotate))


def check_counts(**counts: Any) -> None:
    """Raises ValueError, naming the argument, unless every count is a positive integer."""
    for name, count in counts.items():
        if not isinstance(count, Integral) or count < 1:
            raise ValueError(f"{name} must be a positive integer, got {count!r}")


def _check_arrays(images: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> None:
    if images.dtype != np.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        raise ValueError(
            "images must be [num_images, H, W, C] and labels [num_images], "
            f"got {images.shape} and {labels.shape}"
        )
    if len(set(names)) != len(names):
        raise ValueError("names must be distinct")
    if labels.size == 0 or labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(f"labels must lie in 0..{len(names) - 1}, one for each of the names")


def _check_fits(pool: Pool, way: int, shot: int, query: int) -> None:
    sizes = np.asarray(pool.sizes)
    if way > len(sizes):
        raise ValueError(f"way={way} is more than the {len(sizes)} classes there are")
    if shot + query > sizes.min():
        raise ValueError(
            f"shot + query = {shot} + {query} is more than the smallest class has: "
            f"{pool.names[sizes.argmin()]!r} has {sizes.min()} images"
        )


def _distinct(key: Array, size: int | Array, *, count: int) -> Array:
    """`count` distinct integers below `size` in random order; `size` may be traced.

    Floyd's algorithm (Bentley & Floyd 1987, "A sample of brilliance"): its work depends on `count`
    alone, so classes of unequal size need neither padding nor a sort over the largest.
    """
    pick_key, order_key = jax.random.split(key)
    last = size - count + jnp.arange(count, dtype=jnp.int32)
    picks = jax.random.randint(pick_key, (count,), 0, last + 1, jnp.int32)

    def step(i: Array, chosen: Array) -> Array:
        taken = jnp.any(chosen == picks[i])
        return chosen.at[i].set(jnp.where(taken, last[i], picks[i]))

    chosen = jax.lax.fori_loop(0, count, step, jnp.full(count, -1, jnp.int32))
    # The set is uniform but its order is not: without this, support and query would differ.
    return jax.random.permutation(order_key, chosen)


def _sample(pool: Pool, episode: _Episode, key: Array) -> Task:
    keys = jax.random.split(key, episode.num_tasks)
    return jax.vmap(partial(_task, pool, episode))(keys)


def _task(pool: Pool, episode: _Episode, key: Array) -> Task:
    shot = episode.shot
    planned = plan(
        key,
        pool.starts,
        pool.sizes,
        way=episode.way,
        shot=shot,
        query=episode.query,
        rotate=episode.rotate,
    )
    images = pool.images[planned.examples]
    if episode.rotate:
        images = jax.vmap(_rotate)(images, planned.rotations)
    return Task(_batch(images[:, :shot]), _batch(images[:, shot:]))


def _rotate(images: Array, turns: Array) -> Array:
    """Turns `[..., H, W, C]` anticlockwise by a traced number of quarter turns.

    Two selects, one for each bit of `turns`: a switch would compute all four under vmap.
    """
    images = jnp.where(turns % 2 == 1, jnp.rot90(images, axes=(-3, -2)), images)
    return jnp.where(turns >= 2, images[..., ::-1, ::-1, :], images)


def _batch(images: Array) -> dict[str, Array]:
    """`[way, examples, H, W, C]` as a batch ordered by class."""
    way, examples = images.shape[:2]
    inputs = images.reshape(way * examples, *images.shape[2:]).astype(jnp.float32) / 255
    return {"inputs": inputs, "targets": jnp.repeat(jnp.arange(way, dtype=jnp.int32), examples)}
