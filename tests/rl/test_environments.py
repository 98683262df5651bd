"""Environments: their dynamics, rewards, ends and optima."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmaml import rl

ENVIRONMENTS = {
    "navigation_2d": rl.navigation_2d(),
    "point_robot": rl.point_robot(),
    "bernoulli": rl.bandit(4),
    "gaussian": rl.bandit(4, "gaussian"),
    "tabular_mdp": rl.tabular_mdp(3, 2),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_an_environment_keeps_its_shapes_and_types(name):
    environment = ENVIRONMENTS[name]
    keys = jax.random.split(jax.random.key(0), 3)
    task = environment.sample_task(keys[0])
    state, observation = environment.reset(keys[1], task)
    action = jnp.zeros((), jnp.int32) if environment.is_discrete else jnp.zeros(2)
    step = jax.jit(environment.step)(keys[2], state, action, task)
    kinds = lambda tree: jax.tree.map(lambda leaf: (jnp.shape(leaf), leaf.dtype), tree)
    assert kinds(step.state) == kinds(state)
    assert kinds(step.observation) == kinds(observation)
    assert observation.shape == (environment.observation_size,)
    assert (step.reward.shape, step.done.shape, step.done.dtype) == ((), (), bool)


def test_navigation_clips_the_action_and_ends_at_the_goal():
    environment, key = rl.navigation_2d(), jax.random.key(0)
    goals = jax.vmap(environment.sample_task)(jax.random.split(key, 1000))
    assert -0.5 <= goals.min() < -0.45
    assert 0.45 < goals.max() <= 0.5

    goal = jnp.array([0.2, -0.1])
    step = environment.step(key, jnp.zeros(2), jnp.array([7.0, -0.5]), goal)
    np.testing.assert_allclose(step.state, [0.1, -0.05], rtol=1e-6)
    np.testing.assert_allclose(step.reward, -np.hypot(0.1, 0.05), rtol=1e-6)
    assert not step.done
    near = environment.step(key, jnp.array([0.1, -0.1]), jnp.array([1.09, 0.0]), goal)
    assert near.done
    # Near in one coordinate only is not near.
    assert not environment.step(key, jnp.array([0.1, 0.0]), jnp.array([1.0, 0.0]), goal).done


@pytest.mark.parametrize("make", [rl.navigation_2d, rl.point_robot])
def test_the_optimal_return_of_a_point_is_that_of_going_straight_along_each_axis(make):
    environment, goal, key = make(), jnp.array([0.25, -0.13]), jax.random.key(0)
    state, _ = environment.reset(key, goal)
    total = 0.0
    for _ in range(5):
        step = environment.step(key, state, (goal - state) / 0.1, goal)
        state, total = step.state, total + step.reward
    np.testing.assert_allclose(environment.optimal_return(goal, 5), total, rtol=1e-5)
    np.testing.assert_allclose(total, -(np.hypot(0.15, 0.03) + 0.05), rtol=1e-5)


@pytest.mark.parametrize("kind", ["bernoulli", "gaussian"])
def test_a_bandit_pays_its_means(kind):
    environment = rl.bandit(3, kind)
    means = environment.sample_task(jax.random.key(1))
    keys = jax.random.split(jax.random.key(0), 20_000)
    for arm in range(3):
        pull = lambda key, arm=arm: environment.step(key, (), jnp.array(arm), means).reward
        rewards = jax.vmap(pull)(keys)
        assert rewards.mean() == pytest.approx(float(means[arm]), abs=0.03)
    assert environment.optimal_return is not None
    assert environment.optimal_return(means, 7) == 7 * means.max()


def test_the_optimal_return_of_a_tabular_mdp_is_that_of_the_best_of_all_policies():
    environment, horizon = rl.tabular_mdp(2, 2), 3
    task = environment.sample_task(jax.random.key(0))
    transitions, rewards = np.asarray(task.transitions), np.asarray(task.rewards)
    np.testing.assert_allclose(transitions.sum(-1), 1, rtol=1e-5)

    def value(policy):
        """The expected return of an action for each time and state."""
        found, states = 0.0, np.array([1.0, 0.0])
        for actions in policy:
            chosen = np.array(actions)
            found += states @ rewards[[0, 1], chosen]
            states = states @ transitions[[0, 1], chosen]
        return found

    choices = list(itertools.product(range(2), repeat=2))
    best = max(value(policy) for policy in itertools.product(choices, repeat=horizon))
    assert environment.optimal_return is not None
    np.testing.assert_allclose(environment.optimal_return(task, horizon), best, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rl.bandit(1), "num_arms must be an integer, 2 or more"),
        (lambda: rl.bandit(3, "beta"), "kind must be"),
        (lambda: rl.tabular_mdp(0), "num_states must be an integer, 1 or more"),
        (lambda: rl.sampler(rl.bandit(3), num_tasks=0), "num_tasks must be an integer, 1 or more"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
