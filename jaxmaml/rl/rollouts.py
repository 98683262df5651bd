"""Rollouts: the trajectories of a policy in one task of an environment."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxmaml import trees
from jaxmaml.checks import check_count
from jaxmaml.rl.environments import Environment, EnvTask, check_observation
from jaxmaml.rl.policies import PolicyFn, log_likelihood
from jaxmaml.types import Array, Params


class Trajectories(NamedTuple):
    """The trajectories of one task.

    Attributes:
        observations: before each action, `[num_trajectories, horizon, observation_size]`.
        actions: `[num_trajectories, horizon, action_size]`, or int32 `[num_trajectories, horizon]` if
            they are discrete.
        rewards: after each action, `[num_trajectories, horizon]`; zero after the end, and NaN for an
            action whose likelihood is NaN.
        log_probs: the log-likelihood of each action under the policy that chose it, like `rewards`.
        mask: 1 up to the step that ends the episode, and 0 afterwards, like `rewards`.

    Example:
        >>> import jax.numpy as jnp
        >>> ones = jnp.ones((2, 3))
        >>> Trajectories(jnp.zeros((2, 3, 1)), ones, ones, ones, ones).returns().tolist()
        [3.0, 3.0]
    """

    observations: Array
    actions: Array
    rewards: Array
    log_probs: Array
    mask: Array

    def returns(self) -> Array:
        """Returns the sum of the rewards of each trajectory, without discount, `[num_trajectories]`."""
        return self.rewards.sum(axis=1)


def rollout(
    environment: Environment,
    policy_fn: PolicyFn,
    params: Params,
    task: EnvTask,
    key: Array,
    *,
    num_trajectories: int,
    horizon: int,
) -> Trajectories:
    """Returns trajectories of a policy in one task.

    All trajectories are advanced together, one step after the other: the policy is one matrix product
    per layer and step. Nothing is stopped at the end of an episode; the mask says what counts. The
    derivative passes through the actions and the environment: stop the gradient of the parameters
    (`jax.lax.stop_gradient`) for estimators by likelihood ratios, as `rl.losses` does.

    Args:
        environment: the environment.
        policy_fn: `(params, observations) -> distribution`.
        params: the parameters of the policy.
        task: one task of the environment.
        key: typed PRNG key.
        num_trajectories: the number of trajectories.
        horizon: the number of steps after which an episode is cut.

    Raises:
        TypeError: a count is not an integer.
        ValueError: a count is less than 1; an observation has another size than the environment
            says; or `log_prob` of the distribution has another shape than `[num_trajectories]`.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from jaxmaml import rl
        >>> environment = rl.navigation_2d()
        >>> policy_fn, params = rl.policy(environment, rngs=nnx.Rngs(0))
        >>> keys = jax.random.split(jax.random.key(0))
        >>> task = environment.sample_task(keys[0])
        >>> found = rl.rollout(
        ...     environment, policy_fn, params, task, keys[1], num_trajectories=20, horizon=100
        ... )
        >>> found.actions.shape, found.returns().shape
        ((20, 100, 2), (20,))
    """
    check_count("num_trajectories", num_trajectories)
    check_count("horizon", horizon)
    start_key, step_key = jax.random.split(key)
    starts = jax.random.split(start_key, num_trajectories)
    state, observations = jax.vmap(environment.reset, (0, None))(starts, task)
    check_observation(environment, observations.shape[1:])

    def advance(carry: tuple, number: Array) -> tuple[tuple, Trajectories]:
        state, observations, alive = carry
        act_key, env_key = jax.random.split(jax.random.fold_in(step_key, number))
        # After the end numbers may be anything; a product with the mask would keep a NaN.
        observations = jnp.where(alive[:, None], observations, 0)
        distribution = policy_fn(params, observations)
        actions = distribution.sample(act_key)
        keys = jax.random.split(env_key, num_trajectories)
        step = jax.vmap(environment.step, (0, 0, 0, None))(keys, state, actions, task)
        chex.assert_shape([step.reward, step.done], (num_trajectories,))
        rewards = jnp.where(alive, trees.in_float32(step.reward), 0)
        log_probs = log_likelihood(distribution, actions, rewards)
        rewards = without_diverged(rewards, log_probs, alive)
        found = Trajectories(observations, actions, rewards, log_probs, alive)
        return (step.state, step.observation, alive & ~step.done), found

    alive = jnp.ones(num_trajectories, bool)
    _, steps = jax.lax.scan(advance, (state, observations, alive), jnp.arange(horizon))
    by_trajectory = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), steps)
    return by_trajectory._replace(mask=by_trajectory.mask.astype(by_trajectory.rewards.dtype))


def without_diverged(rewards: Array, log_probs: Array, alive: Array) -> Array:
    """Returns rewards that are NaN where the policy is.

    A distribution of NaN still has samples: the first action, if they are discrete. Their rewards look
    like those of a policy.

    Example:
        >>> import jax.numpy as jnp
        >>> log_probs = jnp.array([-1.0, jnp.nan, jnp.nan])
        >>> without_diverged(jnp.ones(3), log_probs, jnp.array([True, True, False])).tolist()
        [1.0, nan, 1.0]
    """
    return jnp.where(alive & jnp.isnan(log_probs), jnp.nan, rewards)
