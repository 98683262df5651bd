"""Wrappers: environments that are made of other environments."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxmaml.rl.environments import Environment, EnvState, EnvTask, Step
from jaxmaml.types import Array


def observed_task(
    environment: Environment, flatten: Callable[[EnvTask], Array] | None = None
) -> Environment:
    """Returns an environment whose observation ends with the task.

    A policy of this environment need not adapt. It is the oracle of Finn, Abbeel and Levine 2017 (arXiv
    1703.03400, section 5.3), to which adaptation is compared.

    Args:
        environment: the environment that is wrapped.
        flatten: `task -> [task_size]`, what is shown of the task. Defaults to all its numbers, one leaf
            of the task after the other.

    Returns:
        An environment with the tasks, states, actions and rewards of the wrapped one. Its observations
        have `observation_size + task_size` numbers, and the type of the wrapped ones, or of the task
        if those are integers.

    Raises:
        ValueError: `flatten` does not return one axis.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxmaml import rl
        >>> environment = rl.observed_task(rl.navigation_2d())
        >>> goal = jnp.array([0.25, -0.5])
        >>> _, observation = environment.reset(jax.random.key(0), goal)
        >>> environment.observation_size, observation.tolist()
        (4, [0.0, 0.0, 0.25, -0.5])
    """
    shown = flatten or (lambda task: ravel_pytree(task)[0])
    shape = jax.eval_shape(lambda: shown(environment.sample_task(jax.random.key(0)))).shape
    if len(shape) != 1:
        raise ValueError(f"flatten must return an array [task_size]; got shape {list(shape)}")

    def beside(observation: Array, task: EnvTask) -> Array:
        numbers = shown(task)
        # In the type of integer observations a task between 0 and 1 would be 0.
        is_float = jnp.issubdtype(observation.dtype, jnp.floating)
        dtype = observation.dtype if is_float else jnp.result_type(observation, numbers)
        return jnp.concatenate([observation.astype(dtype), numbers.astype(dtype)])

    def reset(key: Array, task: EnvTask) -> tuple[EnvState, Array]:
        state, observation = environment.reset(key, task)
        return state, beside(observation, task)

    def step(key: Array, state: EnvState, action: Array, task: EnvTask) -> Step:
        found = environment.step(key, state, action, task)
        return found._replace(observation=beside(found.observation, task))

    size = environment.observation_size + shape[0]
    return environment._replace(reset=reset, step=step, observation_size=size)
