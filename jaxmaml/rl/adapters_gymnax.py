"""The adapter of gymnax environments. gymnax is imported when the adapter is called."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxmaml import trees
from jaxmaml.rl.adapters import as_arrays, flat, held, import_extra
from jaxmaml.rl.environments import Environment, EnvState, Step
from jaxmaml.types import Array

EnvParams: TypeAlias = Any
"""The parameters of a gymnax environment: a dataclass of numbers."""


def from_gymnax(env: Any, sample_params: Callable[[Array], EnvParams] | None = None) -> Environment:
    """Returns a gymnax environment (github.com/RobertTLange/gymnax) as an `Environment`.

    A task is the parameters of the environment, such as the length of a pole. The episode ends where
    gymnax terminates it, and after `params.max_steps_in_episode` steps. It does not start again: it
    stays where it ended. A continuous action is clipped to the bounds of the action space.

    Args:
        env: the environment, which is the first result of `gymnax.make`.
        sample_params: `key -> params`, of the type of `env.default_params`. Defaults to those
            parameters, in all tasks. Parameters that follow from others are not computed: draw both.

    Returns:
        An environment whose observations are flat vectors.

    Raises:
        ImportError: gymnax is not installed.
        TypeError: `env` is not a gymnax environment, or its actions are neither integers nor arrays.

    Example:
        >>> import gymnax, jax
        >>> from jaxmaml import rl
        >>> env, params = gymnax.make("CartPole-v1")
        >>> def sample_params(key):
        ...     length = jax.random.uniform(key, minval=0.25, maxval=1.0)
        ...     return params.replace(length=length, polemass_length=params.masspole * length)
        >>> environment = rl.from_gymnax(env, sample_params)
        >>> task = environment.sample_task(jax.random.key(0))
        >>> state, observation = environment.reset(jax.random.key(1), task)
        >>> 0.25 <= float(task.length) <= 1.0, observation.shape, environment.action_size
        (True, (4,), 2)
    """
    base = import_extra("gymnax.environments.environment", "gymnax").Environment
    if not isinstance(env, base):
        raise TypeError(
            "env must be a gymnax environment, the first result of gymnax.make; "
            f"got {type(env).__name__}"
        )
    draw = sample_params or (lambda key: env.default_params)
    action_size, is_discrete = _actions(env)

    def sample_task(key: Array) -> EnvParams:
        # A parameter that is a Python number would be a constant of the compiled program.
        return as_arrays(draw(key))

    def reset(key: Array, params: EnvParams) -> tuple[EnvState, Array]:
        observation, state = env.reset_env(key, params)
        return state, flat(observation)

    def step(key: Array, state: EnvState, action: Array, params: EnvParams) -> Step:
        if not is_discrete:
            action = _within(action, env.action_space(params))
        observation, state, reward, terminated, _ = env.step_env(key, state, action, params)
        done = jnp.logical_or(terminated, env.is_truncated(state, params))
        return Step(
            state, flat(observation), trees.in_float32(reward).reshape(()), done.reshape(())
        )

    _, observation = jax.eval_shape(reset, jax.random.key(0), env.default_params)
    (observation_size,) = observation.shape
    return held(Environment(sample_task, reset, step, observation_size, action_size, is_discrete))


def _actions(env: Any) -> tuple[int, bool]:
    """(the length of an action or the number of actions, whether they are integers)."""
    spaces = import_extra("gymnax.environments.spaces", "gymnax")
    space = env.action_space(env.default_params)
    if isinstance(space, spaces.Discrete):
        return int(space.n), True
    if isinstance(space, spaces.Box):
        return math.prod(space.shape), False
    raise TypeError(
        f"the actions of {env.name} are a {type(space).__name__}; allowed are Discrete and Box"
    )


def _within(action: Array, space: Any) -> Array:
    return jnp.clip(action.reshape(space.shape), space.low, space.high)
