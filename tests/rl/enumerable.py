"""A small MDP all of whose trajectories are listed, so that expectations are sums.

Two states, two actions, a horizon of 2, random transitions and fixed rewards: 8 trajectories. Used with
64-bit numbers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxmaml
from jaxmaml import rl
from jaxmaml.rl import collecting

HORIZON = 2
TRANSITIONS = np.array([[[0.7, 0.3], [0.2, 0.8]], [[0.4, 0.6], [0.9, 0.1]]])
REWARDS = np.array([[1.0, -0.5], [0.3, 2.0]])
PARAMS = np.array([[0.3, -0.2], [-0.5, 0.4]])
"""The logits of the actions in each state."""


def policy_fn(params, observations):
    return rl.Categorical(observations @ params)


def _step(key, state, action, task):
    following = jax.random.categorical(key, jnp.log(task.transitions[state, action]))
    seen = jax.nn.one_hot(following, 2, dtype=task.rewards.dtype)
    return rl.Step(following.astype(jnp.int32), seen, task.rewards[state, action], jnp.array(False))


ENVIRONMENT = rl.tabular_mdp(2, 2)._replace(step=_step)
PROBLEM = rl.Problem(
    ENVIRONMENT, policy_fn, num_trajectories=1, horizon=HORIZON, discount=1.0,
    normalize=False, baseline="none",
)  # fmt: skip
"""Its policy gradients have no bias."""


def task():
    return rl.TabularTask(jnp.asarray(TRANSITIONS), jnp.asarray(REWARDS))


def value(params):
    """The expected return, from the last step backwards."""
    policy = jax.nn.softmax(params, axis=1)
    values = jnp.zeros(2)
    for _ in range(HORIZON):
        values = (policy * (REWARDS + TRANSITIONS @ values)).sum(axis=1)
    return values[0]


def later_values(params):
    """The expected return after the first action, by that action."""
    last = (jax.nn.softmax(params, axis=1) * REWARDS).sum(axis=1)
    return REWARDS[0] + TRANSITIONS[0] @ last


class Listed(NamedTuple):
    """All batches that a policy may sample, leaves `[number, num_trajectories, ...]`."""

    found: rl.Trajectories
    log_probs: jax.Array
    """The log-likelihood of each batch, differentiable, `[number]`."""


def listed(params, num_trajectories=1):
    first, second, last = (x.ravel() for x in np.meshgrid([0, 1], [0, 1], [0, 1], indexing="ij"))
    states, actions = np.stack([0 * first, second], axis=1), np.stack([first, last], axis=1)
    log_policy = jax.nn.log_softmax(params, axis=1)[states, actions]
    log_probs = log_policy.sum(axis=1) + np.log(TRANSITIONS[0, first, second])
    rewards = jnp.asarray(REWARDS[states, actions])
    found = rl.Trajectories(
        jnp.eye(2)[states], jnp.asarray(actions), rewards, log_policy, jnp.ones_like(rewards)
    )
    grid = np.meshgrid(*[np.arange(8)] * num_trajectories, indexing="ij")
    chosen = np.stack([x.ravel() for x in grid], axis=1)
    return Listed(jax.tree.map(lambda leaf: leaf[chosen], found), log_probs[chosen].sum(axis=1))


@functools.partial(jax.jit, static_argnums=(0, 2))
def experiences(problem, params, num_trajectories=1):
    """(every batch that a policy may sample, scored; its log-likelihood)."""
    found, log_probs = listed(params, num_trajectories)
    return jax.vmap(functools.partial(problem.score, params))(found), log_probs


class Supports(NamedTuple):
    """Every support that an inner loop may sample, `[number, num_inner_steps, ...]`."""

    support: rl.Experience
    probs: jax.Array
    adapted: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1, 3, 4))
def supports(problem, learner, meta_params, num_inner_steps, num_trajectories=1):
    def extended(before, log_prob, step):
        """The supports that one of a step less leads to."""
        held = collecting._stacked(before, num_inner_steps) if before else None
        params = meta_params
        if held is not None:
            params = learner.adapt(meta_params, held, num_inner_steps=step)[0]
        elif isinstance(meta_params, jaxmaml.Extended):
            params = meta_params.params
        batches, more = experiences(problem, params, num_trajectories)
        spread = lambda leaf: jnp.broadcast_to(leaf, (len(more), *leaf.shape))
        return [*jax.tree.map(spread, before), batches], log_prob + more

    before, log_probs = extended([], 0.0, 0)
    flat = lambda leaf: leaf.reshape(-1, *leaf.shape[2:])
    for step in range(1, num_inner_steps):
        grown = jax.vmap(functools.partial(extended, step=step))(before, log_probs)
        before, log_probs = jax.tree.map(flat, grown)
    support = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *before)
    adapted = jax.vmap(lambda one: learner.adapt(meta_params, one)[0])(support)
    return Supports(support, jnp.exp(log_probs), adapted)


def expected_return(problem, learner, meta_params, num_inner_steps=1, num_trajectories=1):
    """The expected return after adaptation to what the inner loop samples."""
    return _expected_return(problem, learner, meta_params, num_inner_steps, num_trajectories)


# A program of its own for every way of giving the arguments, were it called directly.
@functools.partial(jax.jit, static_argnums=(0, 1, 3, 4))
def _expected_return(problem, learner, meta_params, num_inner_steps, num_trajectories):
    _, probs, adapted = supports(problem, learner, meta_params, num_inner_steps, num_trajectories)
    return probs @ jax.vmap(value)(adapted)


def expected_gradient(problem, learner, meta_params, num_inner_steps=1, num_trajectories=1):
    """The expectation of the meta-gradient over all supports, and queries of one trajectory."""
    return _expected_gradient(problem, learner, meta_params, num_inner_steps, num_trajectories)


@functools.partial(jax.jit, static_argnums=(0, 1, 3, 4))
def _expected_gradient(problem, learner, meta_params, num_inner_steps, num_trajectories):
    found = supports(problem, learner, meta_params, num_inner_steps, num_trajectories)
    grad = jax.grad(learner.loss, has_aux=True)

    def of_support(support, adapted):
        queries, log_probs = experiences(PROBLEM, adapted)
        of_query = lambda query: grad(meta_params, jaxmaml.Task(support, query))[0]
        mean = lambda leaf: jnp.tensordot(jnp.exp(log_probs), leaf, 1)
        return jax.tree.map(mean, jax.vmap(of_query)(queries))

    grads = jax.vmap(of_support)(found.support, found.adapted)
    return jax.tree.map(lambda leaf: jnp.tensordot(found.probs, leaf, 1), grads)
