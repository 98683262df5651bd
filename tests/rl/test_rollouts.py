"""Rollouts against a loop in Python, their masks and what they refuse."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxmaml
from jaxmaml import rl
from tests.rl.jitted import meta_grad

COUNTS: Any = {"num_trajectories": 3, "horizon": 5}


def _counter(last=2, after=0.0):
    """An environment that counts its steps and ends with step `last`; later rewards are `after`."""

    def step(key, count, action, task):
        over = count > last
        reward = jnp.where(over, after, 1.0 * count + task)
        seen = jnp.where(count >= last, after, 1.0 * count + 1)[None]
        return rl.Step(count + 1, seen, reward, count == last)

    start = lambda key, task: (jnp.array(0), jnp.zeros(1))
    return rl.Environment(lambda key: jnp.array(0.0), start, step, 1, 2, is_discrete=True)


@functools.cache
def _policy(environment):
    return rl.policy(environment, hidden_sizes=(4,), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("after", [1e6, jnp.nan])
def test_nothing_counts_after_the_end(after):
    environment = _counter(after=after)
    found = rl.rollout(environment, *_policy(environment), 10.0, jax.random.key(0), **COUNTS)
    np.testing.assert_array_equal(found.mask, [[1, 1, 1, 0, 0]] * 3)
    np.testing.assert_array_equal(found.rewards, [[10, 11, 12, 0, 0]] * 3)
    np.testing.assert_array_equal(found.returns(), [33] * 3)


def test_trajectories_are_those_of_the_policy_and_the_environment():
    environment = rl.navigation_2d()
    policy_fn, params = _policy(environment)
    task = environment.sample_task(jax.random.key(1))
    found = rl.rollout(environment, policy_fn, params, task, jax.random.key(0), **COUNTS)
    for trajectory in range(3):
        state, observation = environment.reset(jax.random.key(0), task)
        for t in range(5):
            np.testing.assert_allclose(found.observations[trajectory, t], observation, rtol=1e-5)
            action = found.actions[trajectory, t]
            log_prob = policy_fn(params, observation).log_prob(action)
            np.testing.assert_allclose(found.log_probs[trajectory, t], log_prob, rtol=1e-4)
            state, observation, reward, _ = environment.step(jax.random.key(0), state, action, task)
            np.testing.assert_allclose(found.rewards[trajectory, t], reward, rtol=1e-5)


def test_each_trajectory_and_step_has_its_own_noise():
    environment = rl.navigation_2d()
    policy_fn, params = _policy(environment)
    sample = jax.jit(
        lambda seed: rl.rollout(
            environment, policy_fn, params, jnp.ones(2), jax.random.key(seed), **COUNTS
        )
    )
    found = sample(0)
    noise = np.asarray(found.log_probs).ravel()
    assert len(np.unique(noise)) == noise.size
    np.testing.assert_array_equal(found.actions, sample(0).actions)
    assert (found.actions != sample(1).actions).all()


@pytest.mark.parametrize("name", COUNTS)
def test_no_trajectories_and_no_steps_are_refused(name):
    environment = rl.navigation_2d()
    with pytest.raises(ValueError, match=f"{name} must be an integer, 1 or more"):
        rl.rollout(
            environment,
            *_policy(environment),
            jnp.ones(2),
            jax.random.key(0),
            **{**COUNTS, name: 0},
        )


def test_an_observation_of_another_size_is_refused():
    environment = rl.navigation_2d()._replace(observation_size=3)
    with pytest.raises(ValueError, match=r"observation of shape \[2\].*observation_size=3"):
        rl.rollout(environment, *_policy(environment), jnp.ones(2), jax.random.key(0), **COUNTS)


@pytest.mark.parametrize(("baseline", "after"), [("linear", jnp.nan), ("none", 1e30)])
def test_a_loss_is_finite_whatever_comes_after_the_end(baseline, after):
    environment = _counter(after=after)
    policy_fn, params = _policy(environment)
    problem = rl.Problem(environment, policy_fn, baseline=baseline, **COUNTS)
    parts = rl.losses(problem)
    options = {"query_loss_fn": parts.query_loss_fn, "at_step": parts.at_step}
    learner = jaxmaml.maml(parts.loss_fn, optax.sgd(0.1), 1, **options)
    tasks = rl.sampler(environment, num_tasks=2)(jax.random.key(0))
    loss, grads, _ = meta_grad(learner, params, tasks)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((loss, grads)))


def test_rewards_may_be_integers():
    environment = _counter()

    def step(key, count, action, task):
        return environment.step(key, count, action, task)._replace(reward=count + 1)

    integers = environment._replace(step=step)
    args = (*_policy(environment), 0, jax.random.key(0))
    found = rl.rollout(integers, *args, **COUNTS)
    np.testing.assert_array_equal(found.rewards, [[1, 2, 3, 0, 0]] * 3)
    assert found.rewards.dtype == found.mask.dtype == jnp.float32
    assert rl.discounted_returns(jnp.array([1, 1, 1]), 0.5).tolist() == [1.75, 1.5, 1.0]


def test_the_return_of_a_diverged_policy_is_nan():
    """Its distribution of NaN still has samples: the first action of a discrete one."""
    environment = rl.bandit(3)
    policy_fn, params = _policy(environment)
    problem = rl.Problem(environment, policy_fn, **COUNTS)
    query = rl.Request(jax.random.key(0), environment.sample_task(jax.random.key(1)))
    diverged = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    metric_fn = rl.losses(problem).metric_fn
    assert jnp.isfinite(metric_fn(params, query))
    assert jnp.isnan(metric_fn(diverged, query))


class _PerCoordinate(rl.Normal):
    """A distribution that forgets to sum over the coordinates of an action."""

    def log_prob(self, actions):
        return jax.scipy.stats.norm.logpdf(actions, self.mean, jnp.exp(self.log_std))

    def kl(self, other):
        return (self.mean - other.mean) ** 2


def test_a_likelihood_with_the_axis_of_the_actions_is_refused():
    environment = rl.navigation_2d()
    policy_fn = lambda params, seen: _PerCoordinate(seen * params, jnp.zeros(2))
    with pytest.raises(ValueError, match=r"one number per action, \[3\]; got \[3, 2\]"):
        rl.rollout(environment, policy_fn, 1.0, jnp.ones(2), jax.random.key(0), **COUNTS)
