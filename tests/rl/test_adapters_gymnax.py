"""gymnax environments through the adapter against gymnax itself. They run where it is installed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxmaml
from jaxmaml import rl

gymnax = pytest.importorskip("gymnax")

NAMES = [
    "CartPole-v1", "Pendulum-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Acrobot-v1",
    "Catch-bsuite", "Reacher-misc", "Breakout-MinAtar",
]  # fmt: skip


def _made(name, sample_params=None):
    env, _ = gymnax.make(name)
    return env, rl.from_gymnax(env, sample_params)


def _action(environment, seed):
    key = jax.random.key(seed)
    if environment.is_discrete:
        return jax.random.randint(key, (), 0, environment.action_size)
    return 5 * jax.random.normal(key, (environment.action_size,))


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_gymnax(name):
    """`env.step` splits its key: the first part is for the step, the second for a new episode."""
    env, environment = _made(name)
    task = environment.sample_task(jax.random.key(0))
    state, observation = environment.reset(jax.random.key(1), task)
    wanted, own_state = env.reset(jax.random.key(1), task)
    step_fn = jax.jit(environment.step)
    np.testing.assert_allclose(observation, wanted.ravel(), rtol=1e-6)
    assert observation.shape == (environment.observation_size,)
    assert observation.dtype == jnp.float32
    for seed in range(5):
        key, action = jax.random.key(seed), _action(environment, seed)
        step = step_fn(jax.random.split(key)[0], state, action, task)
        space = env.action_space(task)
        if not environment.is_discrete:
            action = jnp.clip(action, space.low, space.high).reshape(space.shape)
        _, own_state, reward, terminated, truncated, info = env.step(key, own_state, action, task)
        np.testing.assert_allclose(
            step.observation, info["final_observation"].ravel(), rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(step.reward, reward, rtol=1e-5, atol=1e-6)
        assert step.done == (terminated | truncated)
        assert (step.reward.shape, step.done.shape, step.done.dtype) == ((), (), bool)
        kinds = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
        assert kinds(step.state) == kinds(state)
        if step.done:
            break
        state = step.state


def test_an_episode_ends_where_the_pole_falls_and_stays_there():
    _, environment = _made("CartPole-v1")
    task = environment.sample_task(jax.random.key(0))
    state, _ = environment.reset(jax.random.key(0), task)
    step_fn, steps = jax.jit(environment.step), []
    for _ in range(30):
        steps.append(step_fn(jax.random.key(0), state, jnp.array(1), task))
        state = steps[-1].state
    rewards = [float(step.reward) for step in steps]
    angles = [float(step.observation[2]) for step in steps]
    num_steps = int(sum(rewards))
    assert 5 < num_steps < 15
    assert rewards == [1.0] * num_steps + [0.0] * (30 - num_steps)
    fallen = np.abs(angles) > float(task.theta_threshold_radians)
    assert fallen.tolist() == [False] * (num_steps - 1) + [True] * (31 - num_steps)
    assert len(set(angles[num_steps - 1 :])) == 1
    assert [bool(step.done) for step in steps] == fallen.tolist()


def test_an_episode_ends_at_the_limit_of_its_task():
    _, environment = _made(
        "Pendulum-v1", lambda key: gymnax.make("Pendulum-v1")[1].replace(max_steps_in_episode=3)
    )
    policy_fn, params = rl.policy(environment, hidden_sizes=(), rngs=nnx.Rngs(0))
    task = environment.sample_task(jax.random.key(0))
    found = rl.rollout(
        environment, policy_fn, params, task, jax.random.key(0), num_trajectories=2, horizon=5
    )
    np.testing.assert_array_equal(found.mask, [[1, 1, 1, 0, 0]] * 2)


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_a_compiled_rollout_is_finite(name):
    _, environment = _made(name)
    policy_fn, params = rl.policy(environment, hidden_sizes=(8,), rngs=nnx.Rngs(0))
    task = environment.sample_task(jax.random.key(0))
    run = jax.jit(
        lambda key: rl.rollout(
            environment, policy_fn, params, task, key, num_trajectories=4, horizon=300
        )
    )
    found = run(jax.random.key(1))
    assert all(np.isfinite(leaf).all() for leaf in found)
    assert found.observations.shape == (4, 300, environment.observation_size)
    assert (found.mask.sum(axis=1) == (200 if name == "Pendulum-v1" else found.returns())).all()


def _random_length(key):
    params = gymnax.make("CartPole-v1")[1]
    length = jax.random.uniform(key, minval=0.25, maxval=1.0)
    return params.replace(length=length, polemass_length=params.masspole * length)


def test_tasks_are_drawn_and_change_the_dynamics():
    _, environment = _made("CartPole-v1", _random_length)
    tasks = rl.sampler(environment, num_tasks=50)(jax.random.key(0)).support.task
    assert tasks.length.shape == tasks.gravity.shape == (50,)
    assert 0.25 <= tasks.length.min() < 0.35
    assert 0.9 < tasks.length.max() <= 1.0
    angles = []
    for index in range(2):
        task = jax.tree.map(lambda leaf: leaf[index], tasks)  # noqa: B023
        state, _ = environment.reset(jax.random.key(0), task)
        step = environment.step(jax.random.key(0), state, jnp.array(1), task)
        angles.append(float(step.observation[3]))
    assert abs(angles[0] - angles[1]) > 0.01


@pytest.mark.parametrize(
    ("name", "sample_params"), [("CartPole-v1", _random_length), ("Pendulum-v1", None)]
)
def test_a_meta_gradient_is_finite(name, sample_params):
    _, environment = _made(name, sample_params)
    policy_fn, params = rl.policy(environment, hidden_sizes=(4,), rngs=nnx.Rngs(0))
    parts = rl.losses(rl.Problem(environment, policy_fn, num_trajectories=3, horizon=30))
    learner = jaxmaml.maml(
        parts.loss_fn, optax.sgd(0.1), 1,
        query_loss_fn=parts.query_loss_fn, at_step=parts.at_step,
    )  # fmt: skip
    tasks = rl.sampler(environment, num_tasks=2)(jax.random.key(0))
    _, grads, _ = jax.jit(lambda params: jaxmaml.meta_grad(learner, params, tasks))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert optax.tree.norm(grads) > 1e-3


def test_what_is_not_an_environment_is_refused():
    with pytest.raises(TypeError, match=r"the first result of gymnax.make; got tuple"):
        rl.from_gymnax(gymnax.make("CartPole-v1"))


def test_actions_of_another_kind_are_refused():
    class Pair(type(gymnax.make("CartPole-v1")[0])):
        def action_space(self, params=None):
            return gymnax.environments.spaces.Tuple([super().action_space(params)] * 2)

    with pytest.raises(TypeError, match="are a Tuple; allowed are Discrete and Box"):
        rl.from_gymnax(Pair())
