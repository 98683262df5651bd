"""The sinusoid regression tasks of Finn et al. (2017), section 5.1, sampled inside jit."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp

from jaxmaml.data.episodes import check_counts
from jaxmaml.types import Array, Task

AMPLITUDE = (0.1, 5.0)
PHASE = (0.0, math.pi)
X = (-5.0, 5.0)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Episode:
    """The static half of a sampler: equal settings compare equal, so jit compiles them once."""

    num_tasks: int
    shot: int
    query: int


def curve(amplitude: Array, phase: Array, x: Array) -> Array:
    """The function that a task asks for: `amplitude * sin(x - phase)`, as in the authors' code.

    >>> round(float(curve(2.0, 0.0, jnp.pi / 2)), 6)
    2.0
    """
    return amplitude * jnp.sin(x - phase)


def sampler(*, num_tasks: int, shot: int, query: int) -> jax.tree_util.Partial:
    """A jittable source of sinusoid tasks: `key -> Task`.

    Each task has its own amplitude, uniform in [0.1, 5], and phase, uniform in [0, pi]; support and
    query share them, and x is uniform in [-5, 5].

    Args:
        num_tasks: tasks per call.
        shot: support examples per task.
        query: query examples per task.

    Returns:
        A function of a PRNG key. Its `Task` has `{"inputs": [num_tasks, shot, 1], "targets":
        [num_tasks, shot, 1]}` as support and the same with `query` as query, in JAX's default
        floating-point type.

    Raises:
        ValueError: for a count that is no positive integer.

    >>> tasks = sampler(num_tasks=4, shot=5, query=10)(jax.random.key(0))
    >>> tasks.support["inputs"].shape, tasks.query["targets"].shape
    ((4, 5, 1), (4, 10, 1))
    """
    check_counts(num_tasks=num_tasks, shot=shot, query=query)
    return jax.tree_util.Partial(_sample, _Episode(num_tasks, shot, query))


def _sample(episode: _Episode, key: Array) -> Task:
    # One draw for all: on a CPU each call of the generator costs as much as a layer of the network.
    numbers = jax.random.uniform(key, (episode.num_tasks, 2 + episode.shot + episode.query))
    return jax.vmap(partial(_task, episode))(numbers)


def _task(episode: _Episode, numbers: Array) -> Task:
    """A task of numbers uniform in [0, 1)."""
    amplitude, phase = _spread(numbers[0], AMPLITUDE), _spread(numbers[1], PHASE)
    x = _spread(numbers[2:, None], X)
    batch = {"inputs": x, "targets": curve(amplitude, phase, x)}
    support = {name: leaf[: episode.shot] for name, leaf in batch.items()}
    query = {name: leaf[episode.shot :] for name, leaf in batch.items()}
    return Task(support, query)


def _spread(numbers: Array, interval: tuple[float, float]) -> Array:
    low, high = interval
    return low + (high - low) * numbers
