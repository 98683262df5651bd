"""brax environments through the adapter against brax itself. They run where it is installed."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxmaml
from jaxmaml import rl
from jaxmaml.rl import adapters_brax

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the packages that brax imports
    pytest.importorskip("brax.envs")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Brax System:UserWarning"),
    pytest.mark.filterwarnings("ignore:Accessing `:DeprecationWarning"),  # of mujoco-mjx, by brax
]

ACTIONS = jnp.array([[0.5, -3.0, 0.2, 1.0, -0.4, 0.0], [-1.0, 0.3, 7.0, -0.2, 0.6, -0.9]])
"""Actions, some of them out of range."""


@pytest.fixture(scope="module")
def cheetah():
    """(reset, step) of brax's half-cheetah with a step of one frame, compiled."""
    env = adapters_brax.make_cheetah("spring", 1)
    return jax.jit(env.reset), jax.jit(env.step)


def _x(state):
    return state.pipeline_state.x.pos[0, 0]


@pytest.mark.parametrize(("goal", "task"), [("direction", -1.0), ("velocity", 1.5)])
def test_steps_are_those_of_brax_with_the_rewards_of_the_paper(goal, task, cheetah):
    environment, (reset, step) = rl.half_cheetah(goal), cheetah
    own, own_step = reset(jax.random.key(0)), jax.jit(environment.step)
    state, observation = jax.jit(environment.reset)(jax.random.key(0), task)
    np.testing.assert_allclose(observation, own.obs, rtol=1e-5, atol=1e-6)
    for action in ACTIONS:
        before, own = own, step(own, jnp.clip(action, -1, 1))
        found = own_step(jax.random.key(1), state, action, task)
        np.testing.assert_allclose(found.observation, own.obs, rtol=1e-3, atol=1e-4)
        velocity = (_x(own) - _x(before)) / 0.01
        score = -velocity if goal == "direction" else -abs(velocity - 1.5)
        cost = 0.05 * np.square(np.clip(action, -1, 1)).sum()
        np.testing.assert_allclose(found.reward, score - cost, rtol=1e-3, atol=1e-3)
        assert not found.done
        kinds = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
        assert kinds(found.state) == kinds(state)
        state = found.state


def test_a_long_step_is_that_many_frames_with_one_action(cheetah):
    reset, step = cheetah
    start = reset(jax.random.key(0))
    long = jax.jit(adapters_brax.make_cheetah("spring", 5).step)(start, ACTIONS[0].clip(-1, 1))
    state = start
    for _ in range(5):
        state = step(state, ACTIONS[0].clip(-1, 1))
    np.testing.assert_allclose(long.obs, state.obs, rtol=1e-3, atol=1e-4)
    mean = (_x(state) - _x(start)) / 0.05
    np.testing.assert_allclose(long.metrics["x_velocity"], mean, rtol=1e-3, atol=1e-4)


def test_the_model_is_loaded_without_warnings_and_files(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    adapters_brax.make_cheetah("generalized", 1)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_goals_are_those_of_the_paper():
    keys = jax.random.split(jax.random.key(0), 200)
    direction, velocity = (
        jax.vmap(rl.half_cheetah(goal).sample_task)(keys) for goal in ("direction", "velocity")
    )
    assert set(direction.tolist()) == {-1.0, 1.0}
    assert abs(direction.mean()) < 0.2
    assert 0 <= velocity.min() < 0.1
    assert 1.9 < velocity.max() <= 2


def test_a_meta_gradient_is_finite():
    environment = rl.half_cheetah()
    policy_fn, params = rl.policy(environment, hidden_sizes=(4,), rngs=nnx.Rngs(0))
    parts = rl.losses(rl.Problem(environment, policy_fn, num_trajectories=3, horizon=10))
    learner = jaxmaml.maml(
        parts.loss_fn, optax.sgd(0.1), 1,
        query_loss_fn=parts.query_loss_fn, at_step=parts.at_step,
    )  # fmt: skip
    tasks = rl.sampler(environment, num_tasks=2)(jax.random.key(0))
    _, grads, _ = jax.jit(lambda params: jaxmaml.meta_grad(learner, params, tasks))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert optax.tree.norm(grads) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("backend", adapters_brax.SUBSTEPS)
@pytest.mark.parametrize("frame_skip", [1, 5])
def test_episodes_of_extreme_actions_are_finite(backend, frame_skip):
    """A policy of great deviation: its actions, clipped, are jumps from one bound to the other."""
    environment = rl.half_cheetah(backend=backend, frame_skip=frame_skip)
    policy_fn, params = rl.policy(environment, hidden_sizes=(4,), rngs=nnx.Rngs(0))
    params["log_std"] = jnp.full(6, 3.0)
    run = jax.jit(
        lambda key: rl.rollout(
            environment, policy_fn, params, 1.0, key, num_trajectories=20, horizon=200
        )
    )
    found = run(jax.random.key(0))
    assert np.isfinite(found.observations).all()
    assert (found.mask == 1).all()
    assert abs(found.observations).max() < 100
    assert abs(found.rewards).max() < 20


def _pendulum():
    """The inverted pendulum, whose episode ends when it falls. Its task is a place to be at."""
    from brax import envs

    env = envs.get_environment("inverted_pendulum", backend="generalized")
    reward_fn = lambda before, action, after, place: -abs(after.obs[0] - place) - 0 * before.obs[0]
    return env, rl.from_brax(env, lambda key: jax.random.uniform(key), reward_fn)


def test_an_episode_ends_where_brax_ends_it_and_stays_there():
    env, environment = _pendulum()
    policy_fn, params = rl.policy(environment, hidden_sizes=(), rngs=nnx.Rngs(0))
    params["log_std"] = jnp.full(1, 1.0)
    run = jax.jit(
        lambda key: rl.rollout(
            environment, policy_fn, params, 0.25, key, num_trajectories=6, horizon=60
        )
    )
    found = run(jax.random.key(0))
    assert all(np.isfinite(leaf).all() for leaf in found)
    lengths = np.asarray(found.mask.sum(axis=1)).astype(int)
    assert (lengths < 60).all()
    assert len(set(lengths)) > 1
    # brax's own steps with the same actions, from the position and velocity that were observed.
    step = jax.jit(env.step)
    state = jax.jit(env.reset)(jax.random.key(0))
    start = found.observations[0, 0]
    pipeline_state = jax.jit(env.pipeline_init)(start[:2], start[2:])
    state = state.replace(pipeline_state=pipeline_state)
    for time in range(lengths[0]):
        assert not state.done
        state = step(state, found.actions[0, time].clip(-1, 1))
        np.testing.assert_allclose(found.rewards[0, time], -abs(state.obs[0] - 0.25), atol=1e-3)
        shown = found.observations[0, min(time + 1, 59)]
        np.testing.assert_allclose(shown, state.obs, rtol=1e-3, atol=1e-3)
    assert state.done
    after = found.observations[0, lengths[0] :]
    np.testing.assert_array_equal(after, jnp.broadcast_to(after[0], after.shape))


def test_what_is_not_an_environment_is_refused():
    arguments = lambda key: 0.0, lambda before, action, after, task: after.reward
    with pytest.raises(TypeError, match="env must be a brax environment, got str"):
        rl.from_brax("halfcheetah", *arguments)


def test_an_environment_that_starts_again_by_itself_is_refused():
    from brax import envs

    arguments = lambda key: 0.0, lambda before, action, after, task: after.reward
    env = envs.create("inverted_pendulum", backend="generalized")
    with pytest.raises(ValueError, match="auto_reset=False"):
        rl.from_brax(env, *arguments)
    env = envs.create("inverted_pendulum", backend="generalized", auto_reset=False)
    assert rl.from_brax(env, *arguments).observation_size == 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"goal": "height"}, ValueError, "goal must be one of direction, velocity; got 'height'"),
        ({"backend": "mujoco"}, ValueError, "backend must be one of spring, generalized"),
        ({"frame_skip": 0}, ValueError, "frame_skip must be an integer, 1 or more"),
        ({"frame_skip": 0.5}, TypeError, "frame_skip must be an integer"),
    ],
)
def test_wrong_settings_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        rl.half_cheetah(**options)
