"""Trials: several episodes of a recurrent policy in one task, through which it keeps its memory."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxmaml import trees
from jaxmaml.rl.environments import Environment, EnvTask
from jaxmaml.rl.policies import log_likelihood
from jaxmaml.rl.recurrent import Hidden, Memory, RecurrentPolicy, WithMemory
from jaxmaml.rl.requests import Request
from jaxmaml.rl.rollouts import without_diverged
from jaxmaml.types import Array, Params, Scalar, Task


class Trials(NamedTuple):
    """The trials in one task.

    Attributes:
        inputs: before each action, see `Memory.inputs`,
            `[num_trajectories, num_episodes, horizon, input_size]`.
        actions: `[num_trajectories, num_episodes, horizon, action_size]`, or int32 without the last
            axis if they are discrete.
        rewards: after each action, `[num_trajectories, num_episodes, horizon]`; zero after the end of
            an episode.
        log_probs: the log-likelihood of each action under the policy that chose it, like `rewards`.
        values: the return that the policy predicted before each action, like `rewards`.
        mask: 1 up to the step that ends the episode, and 0 afterwards, like `rewards`.

    Example:
        >>> import jax.numpy as jnp
        >>> ones = jnp.ones((1, 2, 3))
        >>> Trials(ones[..., None], ones, ones, ones, ones, ones).returns().tolist()
        [[3.0, 3.0]]
    """

    inputs: Array
    actions: Array
    rewards: Array
    log_probs: Array
    values: Array
    mask: Array

    def returns(self) -> Array:
        """Returns the undiscounted return of each episode, `[num_trajectories, num_episodes]`."""
        return self.rewards.sum(axis=-1)


class TrialExperience(NamedTuple):
    """Trials with what their loss needs.

    Attributes:
        trials: those of one task.
        advantages: see `trial_advantages`, `[num_trajectories, num_episodes, horizon]`.
        targets: what the values should have been, like `advantages`.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from jaxmaml import rl
        >>> environment = rl.bandit(5)
        >>> policy, params = rl.recurrent_policy(environment, hidden_size=8, rngs=nnx.Rngs(0))
        >>> problem = rl.RecurrentProblem(environment, policy, num_episodes=2, horizon=10)
        >>> tasks = rl.sampler(environment, num_tasks=3)(jax.random.key(0))
        >>> found = jax.vmap(lambda task: problem.experience(params, task))(tasks)
        >>> found.advantages.shape
        (3, 1, 2, 10)
    """

    trials: Trials
    advantages: Array
    targets: Array


class RecurrentProblem(NamedTuple):
    """An environment and a recurrent policy, with the numbers that say how trials are played.

    Attributes:
        environment: the environment.
        policy: see `rl.recurrent_policy`.
        num_episodes: the episodes of a trial.
        num_trajectories: the trials that are played in a task, independent of each other.
        horizon: the steps after which an episode is cut.
        discount: of rewards, through the whole trial, in 0..1.
        gae_lambda: of the advantages, see `trial_advantages`.

    Example:
        >>> from flax import nnx
        >>> from jaxmaml import rl
        >>> environment = rl.tabular_mdp()
        >>> policy, params = rl.recurrent_policy(environment, rngs=nnx.Rngs(0))
        >>> rl.RecurrentProblem(environment, policy, num_episodes=10, horizon=10).gae_lambda
        0.95
    """

    environment: Environment
    policy: RecurrentPolicy
    num_episodes: int = 2
    num_trajectories: int = 1
    horizon: int = 100
    discount: float = 0.99
    gae_lambda: float = 0.95

    def start(self, params: Params) -> Memory:
        """Returns the memory before the first episode in a task."""
        repeat = lambda leaf: jnp.broadcast_to(leaf, (self.num_trajectories, *leaf.shape))
        hidden = jax.tree.map(repeat, self.policy.start(params))
        dtype = jax.tree.leaves(hidden)[0].dtype
        zeros = jnp.zeros(self.num_trajectories, dtype)
        return Memory(hidden, repeat(jnp.zeros(self.environment.action_size, dtype)), zeros, zeros)

    def play(
        self, params: Params, memory: Memory, task: EnvTask, keys: Array
    ) -> tuple[Memory, Trials]:
        """Plays an episode for each key, one after the other.

        The memory of a trial rests from the end of an episode to the start of the next. Nothing is
        differentiated.

        Returns:
            The memory afterwards, and the episodes.
        """
        params, memory = jax.lax.stop_gradient((params, memory))
        episode = functools.partial(self._episode, params, task)
        memory, steps = jax.lax.scan(episode, memory, keys)
        return memory, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 2, 0), steps)

    def experience(self, params: Params, task: Task) -> TrialExperience:
        """Returns the trials in a task of two `Request`s, with advantages.

        The last episode is that of the query, the ones before it are those of the support.
        """
        keys = episode_keys(task.support, self.num_episodes - 1)
        keys = jnp.concatenate([keys, task.query.key[None]])
        _, found = self.play(params, self.start(params), task.support.task, keys)
        advantages = trial_advantages(found, discount=self.discount, gae_lambda=self.gae_lambda)
        return TrialExperience(found, advantages, found.values + advantages)

    def replay(self, params: Params, trials: Trials) -> tuple[Array, Array, Array]:
        """Returns what parameters say of trials that were played, as a function to differentiate.

        Returns:
            (log-likelihoods of the actions, values, entropies of the distributions), each
            `[num_trajectories, num_episodes, horizon]`. After the end of an episode they have no
            meaning.
        """

        def advance(hidden: Hidden, step: tuple[Array, ...]) -> tuple[Hidden, tuple[Array, ...]]:
            inputs, actions, alive = step
            following, distribution, values = self.policy.step(params, hidden, inputs)
            found = distribution.log_prob(actions), values, distribution.entropy()
            return _where(alive > 0, following, hidden), found

        steps = jax.tree.map(_by_step, (trials.inputs, trials.actions, trials.mask))
        _, found = jax.lax.scan(advance, self.start(params).hidden, steps)
        log_probs, values, entropies = (_by_trial(leaf, trials) for leaf in found)
        return log_probs, values, entropies

    def metric_fn(self, adapted: WithMemory, query: Request) -> Array:
        """Returns the mean undiscounted return of one more episode, a metric for `evaluate`."""
        _, found = self.play(adapted.params, adapted.memory, query.task, query.key[None])
        return found.returns().mean()

    def _episode(
        self, params: Params, task: EnvTask, memory: Memory, key: Array
    ) -> tuple[Memory, Trials]:
        """One episode, leaves `[horizon, num_trajectories, ...]`."""
        environment, num_trajectories = self.environment, self.num_trajectories
        start_key, step_key = jax.random.split(key)
        starts = jax.random.split(start_key, num_trajectories)
        state, observations = jax.vmap(environment.reset, (0, None))(starts, task)

        def advance(carry: tuple, number: Array) -> tuple[tuple, Trials]:
            state, observations, alive, memory = carry
            act_key, env_key = jax.random.split(jax.random.fold_in(step_key, number))
            # After the end an observation may be anything, and its derivative too.
            inputs = jnp.where(alive[:, None], memory.inputs(observations), 0)
            hidden, distribution, values = self.policy.step(params, memory.hidden, inputs)
            actions = distribution.sample(act_key)
            keys = jax.random.split(env_key, num_trajectories)
            step = jax.vmap(environment.step, (0, 0, 0, None))(keys, state, actions, task)
            chex.assert_shape([step.reward, step.done], (num_trajectories,))

            # Nothing counts and nothing is remembered either.
            rewards = jnp.where(alive, trees.in_float32(step.reward), 0)
            log_probs = log_likelihood(distribution, actions, rewards)
            rewards = without_diverged(rewards, log_probs, alive)
            following = Memory(hidden, self._encoded(actions), rewards, jnp.zeros_like(rewards))
            memory = _where(alive, following, memory)
            mask = alive.astype(rewards.dtype)
            found = Trials(inputs, actions, rewards, log_probs, values, mask)
            return (step.state, step.observation, alive & ~step.done, memory), found

        alive = jnp.ones(num_trajectories, bool)
        carry = state, observations, alive, memory
        (*_, memory), steps = jax.lax.scan(advance, carry, jnp.arange(self.horizon))
        return memory._replace(done=jnp.ones_like(memory.done)), steps

    def _encoded(self, actions: Array) -> Array:
        if not self.environment.is_discrete:
            return actions
        return jax.nn.one_hot(actions, self.environment.action_size)


def episode_keys(request: Request, num_episodes: int) -> Array:
    """Returns the keys of the episodes of a support, `[num_episodes]`.

    Example:
        >>> import jax
        >>> from jaxmaml import rl
        >>> episode_keys(rl.Request(jax.random.key(0), ()), 3).shape
        (3,)
    """
    return jax.vmap(lambda number: jax.random.fold_in(request.key, number))(
        jnp.arange(num_episodes)
    )


def trial_advantages(
    trials: Trials, *, discount: Scalar = 0.99, gae_lambda: Scalar = 0.95
) -> Array:
    """Returns generalized advantage estimates through whole trials.

    They are those of `rl.advantages` (Schulman et al. 2016, arXiv 1506.02438, equation 16), but the
    rewards of an episode also count for the actions of the episodes before it, so that a policy learns
    to explore. Steps after the end of an episode take no time.

    Args:
        trials: those of one task.
        discount: in 0..1.
        gae_lambda: in 0..1. The paper of RL² has 0.3, with TRPO. With `rl.ppo`, this can end in a policy
            that never explores, as bandits show.

    Returns:
        `[num_trajectories, num_episodes, horizon]`, zero after the end of an episode.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmaml import rl
        >>> ones, zeros = jnp.ones((1, 2, 2)), jnp.zeros((1, 2, 2))
        >>> trials = rl.Trials(ones[..., None], zeros, ones, zeros, zeros, ones)
        >>> trial_advantages(trials, discount=1.0, gae_lambda=1.0).tolist()
        [[[4.0, 3.0], [2.0, 1.0]]]
    """

    def back(carry: tuple[Array, Array], step: tuple) -> tuple[tuple[Array, Array], Array]:
        advantage, value_after = carry
        reward, value, alive = step
        found = reward + discount * value_after - value + discount * gae_lambda * advantage
        return _where(alive > 0, (found, value), carry), found * alive

    steps = tuple(_by_step(leaf) for leaf in (trials.rewards, trials.values, trials.mask))
    zeros = jnp.zeros_like(steps[1][0])
    _, found = jax.lax.scan(back, (zeros, zeros), steps, reverse=True)
    return _by_trial(found, trials)


def _by_step(leaf: Array) -> Array:
    """`[num_episodes * horizon, num_trajectories, ...]`: the steps of the trials in their order."""
    num_trajectories, _, _, *rest = leaf.shape
    return jnp.swapaxes(leaf.reshape(num_trajectories, -1, *rest), 0, 1)


def _by_trial(leaf: Array, trials: Trials) -> Array:
    """The inverse of `_by_step`, for a number per step."""
    return jnp.swapaxes(leaf, 0, 1).reshape(trials.mask.shape)


def _where(alive: Array, first: Any, second: Any) -> Any:
    """Chooses between two pytrees for each trajectory, in the types of the second."""

    def choose(first: Array, second: Array) -> Array:
        column = alive.reshape(-1, *[1] * (first.ndim - 1))
        return jnp.where(column, first, second).astype(second.dtype)

    return jax.tree.map(choose, first, second)
