"""Wrapped environments: the observation has the task, and nothing else has changed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmaml import rl


def test_an_observation_ends_with_the_goal():
    plain, key = rl.navigation_2d(), jax.random.key(0)
    oracle, goal = rl.observed_task(plain), jnp.array([0.3, -0.4])
    assert (oracle.observation_size, oracle.action_size, oracle.is_discrete) == (4, 2, False)
    state, observation = oracle.reset(key, goal)
    np.testing.assert_array_equal(observation, jnp.concatenate([jnp.zeros(2), goal]))

    action = jnp.array([0.5, -1.0])
    step, wanted = (e.step(key, state, action, goal) for e in (oracle, plain))
    np.testing.assert_array_equal(step.observation, jnp.concatenate([wanted.observation, goal]))
    np.testing.assert_array_equal(step.state, wanted.state)
    assert (step.reward, step.done) == (wanted.reward, wanted.done)
    np.testing.assert_array_equal(oracle.sample_task(key), plain.sample_task(key))


def test_all_leaves_of_a_task_are_shown():
    plain = rl.tabular_mdp(3, 2)
    oracle, task = rl.observed_task(plain), plain.sample_task(jax.random.key(0))
    assert oracle.observation_size == 3 + 3 * 2 * 3 + 3 * 2
    _, observation = oracle.reset(jax.random.key(1), task)
    numbers = [jnp.array([1.0, 0, 0]), task.transitions.ravel(), task.rewards.ravel()]
    np.testing.assert_array_equal(observation, jnp.concatenate(numbers))
    assert oracle.optimal_return is not None
    assert plain.optimal_return is not None
    assert oracle.optimal_return(task, 4) == plain.optimal_return(task, 4)


def test_a_function_says_what_is_shown():
    oracle = rl.observed_task(rl.bandit(4), lambda means: jnp.argmax(means)[None])
    _, observation = oracle.reset(jax.random.key(0), jnp.array([0.1, 0.2, 0.9, 0.3]))
    # An integer takes the type of the observation.
    assert (observation.tolist(), observation.dtype) == ([1.0, 2.0], jnp.float32)


def test_a_policy_that_sees_the_goal_walks_to_it():
    """The best policy of an oracle is known: it is reached in the fewest steps."""
    oracle, goal = rl.observed_task(rl.navigation_2d()), jnp.array([0.25, 0.0])

    def to_the_goal(params, observations):
        offset = (observations[..., 2:] - observations[..., :2]) / 0.1
        return rl.Normal(offset, jnp.full(2, -20.0))

    sizes = {"num_trajectories": 1, "horizon": 5}
    found = rl.rollout(oracle, to_the_goal, (), goal, jax.random.key(0), **sizes)
    np.testing.assert_allclose(found.rewards, [[-0.15, -0.05, 0, 0, 0]], atol=1e-6)
    np.testing.assert_array_equal(found.mask, [[1, 1, 1, 0, 0]])


def test_a_problem_takes_a_wrapped_environment():
    oracle = rl.observed_task(rl.navigation_2d())
    policy_fn, params = rl.policy(oracle, hidden_sizes=(4,), rngs=nnx.Rngs(0))
    problem = rl.Problem(oracle, policy_fn, num_trajectories=3, horizon=5)
    task = jax.tree.map(lambda leaf: leaf[0], rl.sampler(oracle, num_tasks=1)(jax.random.key(0)))
    found = problem.experience(params, task.query)
    assert found.observations.shape == (3, 5, 4)
    np.testing.assert_array_equal(found.observations[..., 2:] - task.query.task, 0)


def test_a_task_that_is_not_flat_is_refused():
    with pytest.raises(ValueError, match=r"flatten must return an array \[task_size\].*\[2, 2\]"):
        rl.observed_task(rl.navigation_2d(), lambda goal: jnp.outer(goal, goal))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8])
def test_a_task_beside_integers_keeps_its_digits(dtype):
    plain = rl.navigation_2d()
    start = lambda key, task: (plain.reset(key, task)[0], jnp.zeros(2, dtype))
    oracle = rl.observed_task(plain._replace(reset=start))
    _, observation = oracle.reset(jax.random.key(0), jnp.array([0.25, -0.5]))
    assert observation.tolist() == [0.0, 0.0, 0.25, -0.5]
