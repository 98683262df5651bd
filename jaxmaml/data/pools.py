"""Pools: images on the device, grouped by class, from which tasks are sampled inside `jit`."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np  # noqa: F401  (the examples use it)

from jaxmaml.data import episodes, stored_images
from jaxmaml.data.augmentation import NONE, Augment
from jaxmaml.data.decoders import read_all
from jaxmaml.data.episodes import Episode
from jaxmaml.data.stored_images import Images
from jaxmaml.types import Array, Task


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["images", "starts", "sizes"],
    meta_fields=["names"],
)
@dataclasses.dataclass(frozen=True)
class Pool:
    """All images of one split. Each split is a pool of its own, so classes cannot leak.

    Attributes:
        images: uint8 `[num_images, H, W, C]`, rows sorted by class.
        starts: int32 `[num_classes]`, the first row of each class.
        sizes: int32 `[num_classes]`, the number of images of each class; they may differ.
        names: the name of each class, in the same order.

    Example:
        >>> pool = from_arrays(np.zeros((3, 8, 8, 1), np.uint8), [1, 0, 1], ["a", "b"])
        >>> pool.starts.tolist(), pool.shape
        ([0, 1], (8, 8, 1))
    """

    images: Array
    starts: Array
    sizes: Array
    names: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, channels) of an image."""
        return self.images.shape[1:]


@partial(jax.tree_util.register_dataclass, data_fields=["pool"], meta_fields=["episode"])
@dataclasses.dataclass(frozen=True, eq=False)
class PoolSampler:
    """A source of tasks from a pool. `sampler` returns one.

    Attributes:
        pool: the images of one split.
        episode: the settings of the episodes.

    Example:
        >>> pool = from_arrays(np.zeros((40, 8, 8, 1), np.uint8), np.arange(40) % 4, list("abcd"))
        >>> sample = sampler(pool, num_tasks=3, way=2, shot=1, query=5)
        >>> sample.some(jax.random.key(0), jnp.array([2])).query["inputs"].shape
        (1, 10, 8, 8, 1)
    """

    pool: Pool
    episode: Episode

    @property
    def num_tasks(self) -> int:
        """The tasks of a step."""
        return self.episode.num_tasks

    def __call__(self, key: Array) -> Task:
        """Returns the tasks of a step, which depend on its key only."""
        return self._of_keys(jax.random.split(key, self.num_tasks))

    def some(self, key: Array, index: Array) -> Task:
        """Returns those tasks of a step that have the given numbers, and draws no others."""
        return self._of_keys(jax.random.split(key, self.num_tasks)[index])

    def _of_keys(self, keys: Array) -> Task:
        episode, pool = self.episode, self.pool
        plans = episodes.plan_tasks(episode, pool.starts, pool.sizes, keys)
        return episodes.to_tasks(episode, pool.starts, plans, pool.images[plans.examples], keys)


def from_arrays(images: Any, labels: Any, names: Sequence[str]) -> Pool:
    """Returns a pool of images, sorted by class; within a class they keep their order.

    Args:
        images: uint8 `[num_images, H, W, C]`.
        labels: integers `[num_images]`, each an index into `names`.
        names: distinct class names.

    Returns:
        A `Pool` with `len(names)` classes.

    Raises:
        TypeError: the images are not uint8, or the labels are not integers.
        ValueError: the shapes do not fit, names repeat, a label has no name, or a class no image.

    Example:
        >>> pool = from_arrays(np.zeros((3, 8, 8, 1), np.uint8), [1, 0, 1], ["a", "b"])
        >>> pool.sizes.tolist()
        [1, 2]
    """
    return from_images(stored_images.from_arrays(images, labels, names))


def from_images(images: Images) -> Pool:
    """Decodes all images of a split and puts them on the device.

    Args:
        images: one split, for example of `datasets.images`. It must fit on the device.

    Returns:
        A `Pool` of the same classes.

    Example:
        >>> images = stored_images.from_arrays(np.zeros((3, 8, 8, 1), np.uint8), [1, 0, 1], "ab")
        >>> from_images(images).images.shape
        (3, 8, 8, 1)
    """
    return Pool(
        images=jnp.asarray(read_all(images, len(images.numbers))),
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
    augment: Augment = NONE,
    classes: bool = False,
) -> PoolSampler:
    """Returns a source of tasks that are sampled on the device: a traceable `key -> tasks`.

    The source is a pytree that holds the pool. Pass it to a jitted function as an argument: then
    the images are an input of the program, not a constant in it.

    Args:
        pool: the images of one split.
        num_tasks: tasks per call.
        way: classes per task.
        shot: support examples per class.
        query: query examples per class.
        rotate: whether each class slot turns by a random multiple of 90 degrees, as in the Omniglot
            protocol of Santoro et al. (2016).
        augment: further changes of the pixels, and their scaling.
        classes: whether batches also have "classes", int32 `[num_tasks, way * shot]` (or query):
            the class of each example as an index into `pool.names`. Rotations do not change it.

    Returns:
        A function of a PRNG key. The support of its `Task` is `{"inputs": float32 [num_tasks,
        way * shot, H, W, C], "targets": int32 [num_tasks, way * shot]}`; the query is the same with
        `way * query`. Inputs are in 0..1, then scaled by `augment`. Examples are ordered by class,
        and targets are the class slots 0..way-1.

    Raises:
        TypeError: a count is not an integer.
        ValueError: a count is less than 1, `way` exceeds the number of classes, `shot + query`
            exceeds the size of the smallest class, or `rotate` with images that are not square.

    Example:
        >>> pool = from_arrays(np.zeros((40, 8, 8, 1), np.uint8), np.arange(40) % 4, list("abcd"))
        >>> sample = sampler(pool, num_tasks=3, way=2, shot=1, query=5)
        >>> jax.jit(sample)(jax.random.key(0)).query["inputs"].shape
        (3, 10, 8, 8, 1)
    """
    episode = Episode(
        num_tasks=num_tasks, way=way, shot=shot, query=query, rotate=rotate, augment=augment,
        classes=classes,
    )  # fmt: skip
    return PoolSampler(pool, episodes.checked(episode, pool))
