"""The sinusoid regression tasks of Finn et al. (2017), section 5.1, sampled inside `jit`."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxmaml.checks import check_count
from jaxmaml.types import Array, Task

AMPLITUDE = (0.1, 5.0)
PHASE = (0.0, math.pi)
X = (-5.0, 5.0)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class SinusoidSampler:
    """A source of sinusoid tasks. `sampler` returns one.

    Equal settings compare equal, so `jit` compiles once.

    Attributes:
        num_tasks: tasks per step.
        shot: support examples per task.
        query: query examples per task.

    Example:
        >>> sample = sampler(num_tasks=4, shot=5, query=10)
        >>> sample.some(jax.random.key(0), jnp.array([3])).support["inputs"].shape
        (1, 5, 1)
    """

    num_tasks: int
    shot: int
    query: int

    def __call__(self, key: Array) -> Task:
        """Returns the tasks of a step, which depend on its key only."""
        return jax.vmap(self._to_task)(self._numbers(key))

    def some(self, key: Array, index: Array) -> Task:
        """Returns those tasks of a step that have the given numbers."""
        return jax.vmap(self._to_task)(self._numbers(key)[index])

    def _numbers(self, key: Array) -> Array:
        # One draw for all tasks: on a CPU a call of the generator costs as much as a layer.
        return jax.random.uniform(key, (self.num_tasks, 2 + self.shot + self.query))

    def _to_task(self, numbers: Array) -> Task:
        """Returns the task of `[2 + shot + query]` numbers that are uniform in [0, 1)."""
        amplitude, phase = _spread(numbers[0], AMPLITUDE), _spread(numbers[1], PHASE)
        x = _spread(numbers[2:, None], X)
        batch = {"inputs": x, "targets": curve(amplitude, phase, x)}
        support = {name: leaf[: self.shot] for name, leaf in batch.items()}
        query = {name: leaf[self.shot :] for name, leaf in batch.items()}
        return Task(support, query)


def curve(amplitude: Array, phase: Array, x: Array) -> Array:
    """Returns the targets of a task, `amplitude * sin(x - phase)`, as in the authors' code.

    Args:
        amplitude, phase: the parameters of the task, `[]`.
        x: the inputs, of any shape.

    Returns:
        The targets, of the shape of `x`.

    Example:
        >>> round(float(curve(2.0, 0.0, jnp.pi / 2)), 6)
        2.0
    """
    return amplitude * jnp.sin(x - phase)


def sampler(*, num_tasks: int, shot: int, query: int) -> SinusoidSampler:
    """Returns a source of sinusoid tasks: a traceable `key -> tasks`.

    Each task has its own amplitude, uniform in [0.1, 5], and phase, uniform in [0, pi], which its
    support and query share. The inputs are uniform in [-5, 5].

    Args:
        num_tasks: tasks per call.
        shot: support examples per task.
        query: query examples per task.

    Returns:
        A function of a PRNG key. The support of its `Task` is `{"inputs": [num_tasks, shot, 1],
        "targets": [num_tasks, shot, 1]}`; the query is the same with `query`. The dtype is JAX's
        default floating-point type.

    Raises:
        TypeError: a count is not an integer.
        ValueError: a count is less than 1.

    Example:
        >>> tasks = sampler(num_tasks=4, shot=5, query=10)(jax.random.key(0))
        >>> tasks.support["inputs"].shape, tasks.query["targets"].shape
        ((4, 5, 1), (4, 10, 1))
    """
    return SinusoidSampler(
        check_count("num_tasks", num_tasks), check_count("shot", shot), check_count("query", query)
    )


def _spread(numbers: Array, interval: tuple[float, float]) -> Array:
    low, high = interval
    return low + (high - low) * numbers
