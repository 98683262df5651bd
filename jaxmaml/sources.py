"""Sources of tasks, of three kinds, as one iterator."""

import functools
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxmaml.types import Array, Sampler, Scalar, Stream, Task

Source: TypeAlias = Callable[[Array], Task] | Iterable[Task] | Stream
"""A producer of tasks: a traceable function `key -> tasks`, an iterable of tasks, or a `Stream`.

The tasks of an outer step depend on the key and the step only, except for an iterable, which has its
own order. A function is called with `fold_in(key, step)`; a stream is started at a step."""


def is_traceable(source: Source) -> bool:
    """Returns whether a source is a function `key -> tasks` that `jit` can trace.

    Example:
        >>> is_traceable(lambda key: key), is_traceable([1, 2])
        (True, False)
    """
    return callable(source) and not isinstance(source, Stream)


def check_key(source: Source, key: Array | None) -> None:
    """Raises ValueError unless a key is given exactly if the source needs one.

    Example:
        >>> check_key([], None)
    """
    needs_key = callable(source) or isinstance(source, Stream)
    if needs_key and key is None:
        raise ValueError("key must be given: this source draws its tasks from a typed PRNG key")
    if not needs_key and key is not None:
        raise ValueError("key must be None: this source is an iterable, which has its own order")
    if not needs_key and not isinstance(source, Iterable):
        raise TypeError(
            "a source must be a function key -> tasks, an iterable of tasks or a stream; "
            f"got {type(source).__name__}"
        )


def batches(
    source: Source, key: Array | None, first_step: int = 0, *, share: tuple[int, int] = (0, 1)
) -> Iterator[Task]:
    """Returns an iterator over the tasks of `first_step`, `first_step + 1`, ...

    Args:
        source: a source of any kind. An iterator goes on from where it is.
        key: a typed PRNG key; None for an iterable.
        first_step: the first outer step.
        share: (index, count): which of `count` shares of the tasks of each step is returned, see
            `jaxmaml.parallel.share_of`. An iterable is taken as it is.

    Raises:
        ValueError: a key is missing, or given for an iterable.

    Example:
        >>> import jax, jaxmaml
        >>> source = jaxmaml.data.sinusoid.sampler(num_tasks=4, shot=5, query=10)
        >>> tasks = next(batches(source, jax.random.key(0)))
        >>> tasks.support["inputs"].shape
        (4, 5, 1)
    """
    check_key(source, key)
    if isinstance(source, Stream):
        return _started(_of_share(source, share), key, first_step)
    if callable(source):
        draw = _program(source)
        return (draw(key, step, share) for step in itertools.count(first_step))
    return iter(source)


def _program(source: Any) -> Callable[..., Task]:
    """Returns the compiled `_drawn` of a source that is a function."""
    # A source that is a pytree: its arrays are arguments of one program for all such sources.
    if is_pytree(source):
        return functools.partial(_draw, source)
    # Others are part of the program, which JAX finds again by their hash, if they have one.
    if isinstance(source, Hashable):
        return functools.partial(jax.jit(_drawn, static_argnums=(0, 3)), source)
    return jax.jit(functools.partial(_drawn, source), static_argnums=2)


def is_pytree(source: Source) -> bool:
    """Returns whether a source is a pytree of arrays, as a `jax.tree_util.Partial` is.

    Example:
        >>> is_pytree(lambda key: key), is_pytree(jax.tree_util.Partial(max, 1))
        (False, True)
    """
    return not jax.tree_util.all_leaves([source])


def rows(num_tasks: int, share: tuple[int, int]) -> slice:
    """Returns which tasks of a step are those of a share: sizes differ by one at most.

    Example:
        >>> rows(7, (0, 2)), rows(7, (1, 2))
        (slice(0, 3, None), slice(3, 7, None))
    """
    index, count = share
    return slice(index * num_tasks // count, (index + 1) * num_tasks // count)


def after(source: Source, num_steps: int) -> Source:
    """Returns a source whose first tasks are those after the first `num_steps` steps.

    It is the source itself, except for an iterable: the other kinds are given a step to start at.

    Example:
        >>> list(after([10, 11, 12], 2))
        [12]
    """
    if callable(source) or isinstance(source, Stream):
        return source
    return itertools.islice(source, num_steps, None)


def _of_share(stream: Any, share: tuple[int, int]) -> Stream:
    if share == (0, 1):
        return stream
    if not hasattr(stream, "of_share"):
        raise ValueError(
            f"{type(stream).__name__} cannot be divided between processes: it has no method of_share"
        )
    return stream.of_share(*share)


def _started(stream: Stream, key: Any, first_step: int) -> Iterator[Task]:
    with stream.start(key, first_step) as tasks:
        yield from tasks


def _drawn(source: Any, key: Array, step: Scalar, share: tuple[int, int]) -> Task:
    key = jax.random.fold_in(key, step)
    if isinstance(source, Sampler):
        return source.some(key, jnp.arange(source.num_tasks)[rows(source.num_tasks, share)])
    tasks = source(key)
    num_tasks = jax.tree.leaves(tasks)[0].shape[0]
    return jax.tree.map(lambda leaf: leaf[rows(num_tasks, share)], tasks)


_draw = jax.jit(_drawn, static_argnums=3)
