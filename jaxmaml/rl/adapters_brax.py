"""Environments simulated by brax. brax is imported when a function of this module is called."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxmaml import trees
from jaxmaml.checks import check_choice, check_count
from jaxmaml.rl.adapters import flat, held, import_extra
from jaxmaml.rl.environments import Environment, EnvTask, Step
from jaxmaml.types import Array

BraxState: TypeAlias = Any
"""A `brax.envs.State`."""
RewardFn: TypeAlias = Callable[[BraxState, Array, BraxState, EnvTask], Array]
"""`(state before, action, state after, task) -> []`."""

FRAME = 0.01
"""Seconds per frame of the half-cheetah: the time step of rllab's and Gym's model."""
SUBSTEPS = {"spring": 4, "generalized": 1, "positional": 4}
"""Physics steps per frame. Springs and positions need shorter steps than generalized coordinates."""
CONTROL_COST = 0.5 * 1e-1
"""The cost of an action per its squared length."""


def from_brax(
    env: Any, sample_task: Callable[[Array], EnvTask], reward_fn: RewardFn
) -> Environment:
    """Returns a brax environment (github.com/google/brax) with tasks and rewards of its own.

    The episode ends where brax ends it, and stays there. Actions are clipped to [-1, 1], the range of
    all actions of brax, before the physics and the reward see them.

    Args:
        env: the environment, as `brax.envs.get_environment` returns it.
        sample_task: `key -> task`.
        reward_fn: `(before, action, after, task) -> []`, where `before` and `after` are the
            `brax.envs.State` on both sides of the action; brax's own reward is `after.reward`.

    Returns:
        An environment. Its state holds that of brax, as `state.state`.

    Raises:
        ImportError: brax is not installed.
        TypeError: `env` is not a brax environment.
        ValueError: `env` starts a new episode by itself.

    Example:
        >>> import jax
        >>> from brax import envs
        >>> from jaxmaml import rl
        >>> env = envs.get_environment("inverted_pendulum", backend="generalized")
        >>> environment = rl.from_brax(
        ...     env,
        ...     sample_task=lambda key: jax.random.uniform(key),
        ...     reward_fn=lambda before, action, after, place: -abs(after.obs[0] - place),
        ... )
        >>> environment.observation_size, environment.action_size
        (4, 1)
    """
    _check_env(env)

    def reset(key: Array, task: EnvTask) -> tuple[BraxState, Array]:
        del task
        state = env.reset(key)
        return state, flat(state.obs)

    def step(key: Array, before: BraxState, action: Array, task: EnvTask) -> Step:
        del key
        action = jnp.clip(action, -1.0, 1.0)
        # brax writes into the dict of metrics of the state that it is given, which must be a copy.
        after = env.step(jax.tree.map(lambda leaf: leaf, before), action)
        reward = trees.in_float32(reward_fn(before, action, after, task))
        return Step(after, flat(after.obs), reward, after.done.astype(bool))

    _, observation = jax.eval_shape(reset, jax.random.key(0), None)
    (observation_size,) = observation.shape
    return held(Environment(sample_task, reset, step, observation_size, env.action_size))


def half_cheetah(
    goal: str = "direction", *, backend: str = "spring", frame_skip: int = 1
) -> Environment:
    """Returns the half-cheetah: Finn, Abbeel and Levine 2017 (arXiv 1703.03400), section 5.3.

    The task is a direction of running, -1 or 1, or a velocity in meters per second, uniform in [0, 2].
    The reward is the velocity in that direction, or minus the distance of the velocity from the goal,
    less 0.05 times the squared length of the action (cbfinn/maml_rl on GitHub,
    `half_cheetah_env_rand_direc.py` and `half_cheetah_env_rand.py`). Episodes have no end other than
    the horizon (200 in the paper).

    It differs from the paper's in three points. The physics is brax's, whose motors and contacts are
    not those of MuJoCo. The velocity is the mean over a step of that of the torso, as in Gym, not that
    of the center of mass at its end. The observation is the position, without the horizontal one, and
    the velocity of all 9 joints; the authors add the center of mass.

    Args:
        goal: "direction" or "velocity".
        backend: the physics of brax: "spring", "generalized" or "positional". The fastest is
            "spring": 13,000 steps per second of 40 environments on two busy CPU cores, where
            "generalized" made 4,000. Their compilation takes minutes there.
        frame_skip: the frames of 0.01 seconds per action: 1 in the authors' code, 5 in Gym and brax.
            The time of a step grows with it.

    Raises:
        ImportError: brax is not installed.
        TypeError: `frame_skip` is not an integer.
        ValueError: another goal or backend, or `frame_skip` is less than 1.

    Example:
        >>> import jax
        >>> from jaxmaml import rl
        >>> environment = rl.half_cheetah("velocity")
        >>> goal = environment.sample_task(jax.random.key(0))
        >>> 0 <= float(goal) <= 2, environment.observation_size, environment.action_size
        (True, 17, 6)
    """
    check_choice("goal", goal, ("direction", "velocity"))
    check_choice("backend", backend, tuple(SUBSTEPS))
    check_count("frame_skip", frame_skip)

    def sample_task(key: Array) -> Array:
        if goal == "direction":
            return jax.random.rademacher(key, dtype=jnp.float32)
        return jax.random.uniform(key, maxval=2.0)

    def reward_fn(before: BraxState, action: Array, after: BraxState, task: Array) -> Array:
        del before
        velocity = after.metrics["x_velocity"]
        score = task * velocity if goal == "direction" else -jnp.abs(velocity - task)
        return score - CONTROL_COST * jnp.sum(jnp.square(action))

    return from_brax(make_cheetah(backend, frame_skip), sample_task, reward_fn)


def make_cheetah(backend: str, frame_skip: int) -> Any:
    """Returns brax's half-cheetah with a step of some frames.

    Args:
        backend: a key of `SUBSTEPS`.
        frame_skip: frames per action.

    Example:
        >>> round(float(make_cheetah("spring", 5).dt), 3)
        0.05
    """
    envs = import_extra("brax.envs", "brax")
    with _quiet():
        env = envs.get_environment(
            "halfcheetah", backend=backend, n_frames=frame_skip * SUBSTEPS[backend]
        )
    env.sys = env.sys.tree_replace({"opt.timestep": FRAME / SUBSTEPS[backend]})
    return env


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ignores what every load of the model warns of: its age, and that brax is not maintained.

    MuJoCo would write it into a file in the current directory.
    """
    mujoco = import_extra("mujoco", "brax")
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Brax System")
            yield
    finally:
        mujoco.set_mju_user_warning(before)


def _check_env(env: Any) -> None:
    envs = import_extra("brax.envs", "brax")
    if not isinstance(env, envs.Env):
        raise TypeError(f"env must be a brax environment, got {type(env).__name__}")
    while isinstance(env, envs.Wrapper):
        if isinstance(env, envs.training.AutoResetWrapper):
            raise ValueError(
                "env starts a new episode by itself: make it by brax.envs.get_environment, "
                "or by brax.envs.create with auto_reset=False"
            )
        env = env.env
