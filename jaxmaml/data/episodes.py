"""Episodes: planned as indices, wherever their pixels come from, and made tasks on the device."""

import dataclasses
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmaml.data import augment
from jaxmaml.data.augment import Augment
from jaxmaml.types import Array, Task


class Plan(NamedTuple):
    """One episode as indices.

    Attributes:
        examples: int32 `[way, shot + query]`, rows of the images, the support's first.
        rotations: int32 `[way]`, anticlockwise quarter turns of each class slot, 0..3.
    """

    examples: Array
    rotations: Array


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Episode:
    """What every episode of a source is like: equal settings compare equal, so jit compiles once.

    Attributes:
        num_tasks: tasks per step.
        way: classes per task.
        shot: support examples per class.
        query: query examples per class.
        rotate: turn each class slot by a random multiple of 90 degrees.
        augment: what else is done to the pixels.
        classes: batches also have "classes", each example's class among all of the source.
    """

    num_tasks: int
    way: int
    shot: int
    query: int
    rotate: bool = False
    augment: Augment = dataclasses.field(default_factory=Augment)
    classes: bool = False


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
    classes = distinct(class_key, len(sizes), way)
    offsets = jax.vmap(partial(distinct, most=shot + query))(
        jax.random.split(example_key, way), sizes[classes]
    )
    turns = 4 if rotate else 1
    rotations = jax.random.randint(rotation_key, (way,), 0, turns, jnp.int32)
    return Plan(starts[classes][:, None] + offsets, rotations)


def plan_step(episode: Episode, starts: Any, sizes: Any, key: Array) -> Plan:
    """The plans of one step's tasks, leaves `[num_tasks, ...]`."""
    one = partial(
        plan,
        starts=starts,
        sizes=sizes,
        way=episode.way,
        shot=episode.shot,
        query=episode.query,
        rotate=episode.rotate,
    )
    return jax.vmap(one)(jax.random.split(key, episode.num_tasks))


def to_tasks(episode: Episode, images: Array, rotations: Array, key: Array) -> Task:
    """Pixels as tasks: turned, augmented and scaled.

    Args:
        episode: whose `num_tasks` the arrays need not have: a process may hold some of them.
        images: uint8 `[num_tasks, way, shot + query, H, W, C]`.
        rotations: int32 `[num_tasks, way]`.
        key: one for each task, `[num_tasks]`.
    """

    def one(images, rotations, key):
        if episode.rotate:
            images = jax.vmap(_rotate)(images, rotations)
        images = augment.apply(episode.augment, images, key)
        return Task(_batch(images[:, : episode.shot]), _batch(images[:, episode.shot :]))

    return jax.vmap(one)(images, rotations, key)


def check(
    episode: Episode, sizes: Any, names: tuple[str, ...], image_shape: tuple[int, ...]
) -> None:
    """Raises ValueError unless classes of these sizes and images of this shape give such episodes."""
    for name in ("num_tasks", "way", "shot", "query"):
        check_counts(**{name: getattr(episode, name)})
    sizes = np.asarray(sizes)
    if episode.way > len(sizes):
        raise ValueError(f"way={episode.way} is more than the {len(sizes)} classes there are")
    if episode.shot + episode.query > sizes.min():
        raise ValueError(
            f"shot + query = {episode.shot} + {episode.query} is more than the smallest class has: "
            f"{names[sizes.argmin()]!r} has {sizes.min()} images"
        )
    if episode.rotate and image_shape[0] != image_shape[1]:
        raise ValueError(f"rotate=True needs square images, got {image_shape[:2]}")
    augment.check(episode.augment, image_shape)


def check_counts(**counts: Any) -> None:
    """Raises ValueError, naming the argument, unless every count is a positive integer."""
    for name, count in counts.items():
        if not isinstance(count, Integral) or count < 1:
            raise ValueError(f"{name} must be a positive integer, got {count!r}")


def distinct(key: Array, size: int | Array, most: int, count: int | Array | None = None) -> Array:
    """Distinct integers below `size` in random order; `size` and `count` may be traced.

    Floyd's algorithm (Bentley & Floyd 1987, "A sample of brilliance"): its work depends on `most`
    alone, so classes of unequal size need neither padding nor a sort over the largest.

    Returns:
        int32 `[most]`: `count` of them (None: `most`), then -1.
    """
    pick_key, order_key = jax.random.split(key)
    index = jnp.arange(most, dtype=jnp.int32)
    last = size - (most if count is None else count) + index
    picks = jax.random.randint(pick_key, (most,), 0, last + 1, jnp.int32)

    def step(i: Array, chosen: Array) -> Array:
        taken = jnp.any(chosen == picks[i])
        return chosen.at[i].set(jnp.where(taken, last[i], picks[i]))

    chosen = jax.lax.fori_loop(0, most, step, jnp.full(most, -1, jnp.int32))
    # The set is uniform but its order is not: without this, support and query would differ.
    if count is None:
        return jax.random.permutation(order_key, chosen)
    chosen = jnp.where(index < count, chosen, -1)
    order = jnp.where(index < count, jax.random.uniform(order_key, (most,)), 2.0)
    return chosen[jnp.argsort(order)]


def _rotate(images: Array, turns: Array) -> Array:
    """Turns `[..., H, W, C]` anticlockwise by a traced number of quarter turns.

    Two selects, one for each bit of `turns`: a switch would compute all four under vmap.
    """
    images = jnp.where(turns % 2 == 1, jnp.rot90(images, axes=(-3, -2)), images)
    return jnp.where(turns >= 2, images[..., ::-1, ::-1, :], images)


def _batch(images: Array) -> dict[str, Array]:
    """`[way, examples, H, W, C]` as a batch ordered by class."""
    way, examples = images.shape[:2]
    inputs = images.reshape(way * examples, *images.shape[2:])
    return {"inputs": inputs, "targets": jnp.repeat(jnp.arange(way, dtype=jnp.int32), examples)}
