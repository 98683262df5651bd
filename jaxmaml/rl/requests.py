"""Tasks of reinforcement learning, whose support and query are sampled by the learner itself."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmaml.checks import check_count
from jaxmaml.rl.environments import Environment, EnvTask
from jaxmaml.types import Array, Task


class Request(NamedTuple):
    """A batch that is still to be sampled: the support or the query of a task.

    Attributes:
        key: typed PRNG key of the trajectories.
        task: one task of the environment.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> Request(jax.random.key(0), jnp.zeros(2)).task.shape
        (2,)
    """

    key: Array
    task: EnvTask


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class RequestSampler:
    """A source of tasks of an environment. `sampler` returns one.

    Attributes:
        environment: the environment, which draws the tasks.
        num_tasks: tasks per step.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxmaml import rl
        >>> sample = rl.sampler(rl.navigation_2d(), num_tasks=4)
        >>> sample.some(jax.random.key(0), jnp.array([3])).query.task.shape
        (1, 2)
    """

    environment: Environment
    num_tasks: int

    def __call__(self, key: Array) -> Task:
        """Returns the tasks of a step, which depend on its key only."""
        return self.some(key, jnp.arange(self.num_tasks))

    def some(self, key: Array, index: Array) -> Task:
        """Returns those tasks of a step that have the given numbers."""
        return jax.vmap(lambda number: self._one(jax.random.fold_in(key, number)))(index)

    def _one(self, key: Array) -> Task:
        task_key, support_key, query_key = jax.random.split(key, 3)
        task = self.environment.sample_task(task_key)
        return Task(Request(support_key, task), Request(query_key, task))


def sampler(environment: Environment, *, num_tasks: int) -> RequestSampler:
    """Returns a source of tasks of an environment: a traceable `key -> tasks`.

    Args:
        environment: the environment.
        num_tasks: tasks per call.

    Returns:
        A function of a PRNG key. The support and the query of its `Task` are `Request`s with a leading
        task axis: the same task of the environment, and a key each.

    Raises:
        TypeError: `num_tasks` is not an integer.
        ValueError: `num_tasks` is less than 1.

    Example:
        >>> import jax
        >>> from jaxmaml import rl
        >>> tasks = rl.sampler(rl.bandit(3), num_tasks=4)(jax.random.key(0))
        >>> tasks.support.task.shape, tasks.support.key.shape
        ((4, 3), (4,))
    """
    return RequestSampler(environment, check_count("num_tasks", num_tasks))
