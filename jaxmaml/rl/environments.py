"""Environments of meta-reinforcement-learning, as pure functions.

A task is a pytree that `sample_task` draws, such as a goal. It is an argument of `reset` and `step`, so
that one compiled program serves all tasks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxmaml.checks import check_choice, check_count
from jaxmaml.types import Array

EnvTask: TypeAlias = Any
"""The parameters of one task of an environment: a pytree of arrays."""
EnvState: TypeAlias = Any
"""The state of an environment: a pytree of arrays."""


class Step(NamedTuple):
    """The result of one action.

    Attributes:
        state: the next state.
        observation: what the policy sees of it, `[observation_size]`.
        reward: `[]`.
        done: whether the episode ends with this step, bool `[]`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> task = jnp.array([0.0, 1.0])
        >>> step = bandit(2).step(jax.random.key(0), (), jnp.array(1), task)
        >>> float(step.reward), bool(step.done)
        (1.0, False)
    """

    state: EnvState
    observation: Array
    reward: Array
    done: Array


class Environment(NamedTuple):
    """An environment with a distribution of tasks, as pure functions of one episode.

    Attributes:
        sample_task: `key -> task`.
        reset: `(key, task) -> (state, observation)`.
        step: `(key, state, action, task) -> Step`.
        observation_size: the length of an observation.
        action_size: the length of an action or, if actions are discrete, their number.
        is_discrete: whether an action is an integer in 0..action_size-1.
        optimal_return: `(task, horizon) -> []`, the expected return of the best policy that knows the
            task; None where no formula is known.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> environment = navigation_2d()
        >>> goal = jnp.array([0.3, 0.4])
        >>> state, observation = environment.reset(jax.random.key(0), goal)
        >>> step = environment.step(jax.random.key(1), state, jnp.zeros(2), goal)
        >>> observation.shape, round(float(step.reward), 3), bool(step.done)
        ((2,), -0.5, False)
    """

    sample_task: Callable[[Array], EnvTask]
    reset: Callable[[Array, EnvTask], tuple[EnvState, Array]]
    step: Callable[[Array, EnvState, Array, EnvTask], Step]
    observation_size: int
    action_size: int
    is_discrete: bool = False
    optimal_return: Callable[[EnvTask, int], Array] | None = None


def check_observation(environment: Environment, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless an observation has the shape that the environment says."""
    if shape != (environment.observation_size,):
        raise ValueError(
            f"reset returns an observation of shape {list(shape)}, but the environment says "
            f"observation_size={environment.observation_size}"
        )


def navigation_2d() -> Environment:
    """Returns 2D navigation: Finn, Abbeel and Levine 2017 (arXiv 1703.03400), section 5.3.

    A point starts at the origin and observes its position. The task is a goal, uniform in the square
    [-0.5, 0.5]². An action is a displacement in units of 0.1, clipped to one unit per coordinate. The
    reward is minus the distance to the goal: the paper writes its square, but its returns are those of
    the distance, as in the authors' code. The episode ends within 0.01 of the goal in both coordinates.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> goal = jnp.array([0.1, 0.0])
        >>> step = navigation_2d().step(jax.random.key(0), jnp.zeros(2), jnp.array([5.0, 0.0]), goal)
        >>> step.state.tolist() == goal.tolist(), float(step.reward), bool(step.done)
        (True, -0.0, True)
    """

    def sample_task(key: Array) -> Array:
        return jax.random.uniform(key, (2,), minval=-0.5, maxval=0.5)

    def step(key: Array, position: Array, action: Array, goal: Array) -> Step:
        del key
        position = _moved(position, action)
        offset = position - goal
        done = jnp.all(jnp.abs(offset) < 0.01)
        return Step(position, position, -_length(offset), done)

    return Environment(sample_task, _at_origin, step, 2, 2, optimal_return=_return_of_travel)


def point_robot() -> Environment:
    """Returns the point robot: goals on a half circle, as in Rakelly et al. 2019 (arXiv 1903.08254).

    As `navigation_2d`, but with goals on the upper half of the unit circle, and episodes without an
    end other than the horizon (20 in the paper).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> goal = point_robot().sample_task(jax.random.key(0))
        >>> round(float(jnp.linalg.norm(goal)), 3), bool(goal[1] >= 0)
        (1.0, True)
    """

    def sample_task(key: Array) -> Array:
        angle = jax.random.uniform(key, maxval=jnp.pi)
        return jnp.stack([jnp.cos(angle), jnp.sin(angle)])

    def step(key: Array, position: Array, action: Array, goal: Array) -> Step:
        del key
        position = _moved(position, action)
        return Step(position, position, -_length(position - goal), jnp.array(False))

    return Environment(sample_task, _at_origin, step, 2, 2, optimal_return=_return_of_travel)


def bandit(num_arms: int = 5, kind: str = "bernoulli") -> Environment:
    """Returns a bandit: Duan et al. 2016, RL² (arXiv 1611.02779), section 3.1.

    The task is the mean of each arm, uniform in [0, 1] for Bernoulli rewards, and from N(0, 1) for
    Gaussian ones, whose standard deviation is 1. The observation is always 1; each step is a pull.

    Args:
        num_arms: the number of arms.
        kind: "bernoulli" or "gaussian".

    Raises:
        TypeError: `num_arms` is not an integer.
        ValueError: fewer than 2 arms, or another kind.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> environment = bandit(3)
        >>> means = jnp.array([0.0, 1.0, 0.5])
        >>> step = environment.step(jax.random.key(0), (), jnp.array(1), means)
        >>> float(step.reward), float(environment.optimal_return(means, 10))
        (1.0, 10.0)
    """
    check_count("num_arms", num_arms, minimum=2)
    check_choice("kind", kind, ("bernoulli", "gaussian"))
    seen = lambda: jnp.ones(1)

    def sample_task(key: Array) -> Array:
        draw = jax.random.uniform if kind == "bernoulli" else jax.random.normal
        return draw(key, (num_arms,))

    def step(key: Array, state: EnvState, action: Array, means: Array) -> Step:
        mean = means[action]
        if kind == "bernoulli":
            reward = jax.random.bernoulli(key, mean).astype(means.dtype)
        else:
            reward = mean + jax.random.normal(key, dtype=means.dtype)
        return Step(state, seen(), reward, jnp.array(False))

    return Environment(
        sample_task,
        lambda key, means: ((), seen()),
        step,
        observation_size=1,
        action_size=num_arms,
        is_discrete=True,
        optimal_return=lambda means, horizon: horizon * means.max(),
    )


class TabularTask(NamedTuple):
    """One task of `tabular_mdp`.

    Attributes:
        transitions: the probability of the next state, `[num_states, num_actions, num_states]`.
        rewards: the mean reward, `[num_states, num_actions]`.

    Example:
        >>> import jax
        >>> tabular_mdp(3, 2).sample_task(jax.random.key(0)).rewards.shape
        (3, 2)
    """

    transitions: Array
    rewards: Array


def tabular_mdp(num_states: int = 10, num_actions: int = 5) -> Environment:
    """Returns random tabular MDPs: Duan et al. 2016, RL² (arXiv 1611.02779), section 3.1.

    Transitions are from a flat Dirichlet distribution. Rewards are Gaussian with standard deviation 1
    around a mean from N(1, 1). An episode starts in state 0; the paper's horizon is 10. The observation
    is the state, one-hot.

    Args:
        num_states, num_actions: the paper's by default.

    Raises:
        TypeError: a count is not an integer.
        ValueError: a count is less than 1.

    Example:
        >>> import jax
        >>> environment = tabular_mdp()
        >>> task = environment.sample_task(jax.random.key(0))
        >>> task.transitions.shape, task.rewards.shape
        ((10, 5, 10), (10, 5))
    """
    check_count("num_states", num_states)
    check_count("num_actions", num_actions)
    seen = lambda state, task: jax.nn.one_hot(state, num_states, dtype=task.rewards.dtype)

    def sample_task(key: Array) -> TabularTask:
        keys = jax.random.split(key)
        transitions = jax.random.dirichlet(keys[0], jnp.ones(num_states), (num_states, num_actions))
        return TabularTask(transitions, 1 + jax.random.normal(keys[1], (num_states, num_actions)))

    def reset(key: Array, task: TabularTask) -> tuple[Array, Array]:
        del key
        state = jnp.zeros((), jnp.int32)
        return state, seen(state, task)

    def step(key: Array, state: Array, action: Array, task: TabularTask) -> Step:
        keys = jax.random.split(key)
        reward = task.rewards[state, action] + jax.random.normal(keys[0], dtype=task.rewards.dtype)
        logits = jnp.log(task.transitions[state, action])
        state = jax.random.categorical(keys[1], logits).astype(jnp.int32)
        return Step(state, seen(state, task), reward, jnp.array(False))

    return Environment(
        sample_task, reset, step, num_states, num_actions, True, _optimal_tabular_return
    )


def _optimal_tabular_return(task: TabularTask, horizon: int) -> Array:
    """Value iteration over the horizon, from state 0."""
    backup = lambda _, values: jnp.max(task.rewards + task.transitions @ values, axis=1)
    return jax.lax.fori_loop(0, horizon, backup, jnp.zeros_like(task.rewards[:, 0]))[0]


def _at_origin(key: Array, task: Array) -> tuple[Array, Array]:
    del key
    origin = jnp.zeros_like(task)
    return origin, origin


def _moved(position: Array, action: Array) -> Array:
    return position + 0.1 * jnp.clip(action, -1.0, 1.0)


def _return_of_travel(goal: Array, horizon: int) -> Array:
    """The return of going to the goal at full speed along each coordinate, and staying there."""
    steps = jnp.arange(1, horizon + 1, dtype=goal.dtype)[:, None]
    left = jnp.maximum(jnp.abs(goal) - 0.1 * steps, 0)
    return -jax.vmap(_length)(left).sum()


def _length(offset: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(offset)))
