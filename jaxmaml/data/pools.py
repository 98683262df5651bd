"""Images on the device, grouped by class, from which episodes are sampled inside jit."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmaml.data import augment as augmenting
from jaxmaml.data import episodes
from jaxmaml.data import images as stored
from jaxmaml.data.augment import Augment
from jaxmaml.data.episodes import Episode
from jaxmaml.data.images import Images
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
    return from_images(stored.from_arrays(images, labels, names))


def from_images(images: Images) -> Pool:
    """All images of a split, decoded now, on the device: for sets that fit there."""
    return Pool(
        images=jnp.asarray(images.read(np.arange(len(images.numbers)))),
        starts=jnp.asarray(images.starts),
        sizes=jnp.asarray(images.sizes),
        names=images.names,
    )


def sampler(
    pool: Pool,
    *,
    num_tasks: int,
    way: int,
    shot: int,
    query: int,
    rotate: bool = False,
    augment: Augment = augmenting.NONE,
    classes: bool = False,
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
        augment: what else is done to the pixels.
        classes: batches also have "classes" int32 `[num_tasks, way*shot]` (or query), indices into
            `pool.names`; a turned class has the number of the upright one.

    Returns:
        A function of a PRNG key. Its `Task` has `{"inputs": float32 [num_tasks, way*shot, H, W, C]
        in 0..1 (scaled as `augment` says), "targets": int32 [num_tasks, way*shot]}` as support, and
        the same with `way*query` as query. Examples are ordered by class; targets are the class
        slots 0..way-1.

    Raises:
        ValueError: for a count that is no positive integer, more classes than the pool has, more
            examples than its smallest class has, or `rotate` with images that are not square.

    >>> pool = from_arrays(np.zeros((40, 8, 8, 1), np.uint8), np.arange(40) % 4, list("abcd"))
    >>> sample = sampler(pool, num_tasks=3, way=2, shot=1, query=5)
    >>> sample(jax.random.key(0)).query["inputs"].shape
    (3, 10, 8, 8, 1)
    """
    episode = Episode(
        num_tasks=num_tasks, way=way, shot=shot, query=query, rotate=rotate, augment=augment,
        classes=classes,
    )  # fmt: skip
    episodes.check(episode, pool.sizes, pool.names, pool.images.shape[1:])
    return jax.tree_util.Partial(_sample, pool, episode)


def _sample(pool: Pool, episode: Episode, key: Array) -> Task:
    planned = episodes.plan_step(episode, pool.starts, pool.sizes, key)
    keys = jax.random.split(key, episode.num_tasks)
    tasks = episodes.to_tasks(episode, pool.images[planned.examples], planned.rotations, keys)
    if not episode.classes:
        return tasks
    numbers = jnp.searchsorted(pool.starts, planned.examples, side="right").astype(jnp.int32) - 1
    flat = lambda part: part.reshape(episode.num_tasks, -1)
    return Task(
        {**tasks.support, "classes": flat(numbers[..., : episode.shot])},
        {**tasks.query, "classes": flat(numbers[..., episode.shot :])},
    )
