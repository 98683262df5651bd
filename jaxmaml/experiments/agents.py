"""The environments of the commands, and the policies that are trained in them."""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmaml import rl
from jaxmaml.experiments.networks import Model, Network
from jaxmaml.experiments.settings import Preset
from jaxmaml.types import Array, Task

ENVIRONMENTS: dict[str, Callable[[], rl.Environment]] = {
    "nav2d": rl.navigation_2d,
    "bandits": rl.bandit,
    "tabular-mdp": rl.tabular_mdp,
    "cheetah-dir": functools.partial(rl.half_cheetah, "direction"),
    "cheetah-vel": functools.partial(rl.half_cheetah, "velocity"),
}
"""The constructor of each environment."""


def environment(preset: Preset) -> rl.Environment:
    """Returns the environment of a preset.

    Raises:
        ImportError: the environment needs a package that is not installed.
    """
    return ENVIRONMENTS[preset.dataset]()


def build(preset: Preset, key: Array) -> Network:
    """Returns the policy of a preset with initial parameters.

    Args:
        preset: the settings.
        key: the PRNG key of the initial parameters.
    """
    env = environment(preset)
    policy_fn, params = rl.policy(env, hidden_sizes=preset.hidden_sizes, rngs=nnx.Rngs(key))
    problem = rl.Problem(
        env, policy_fn, preset.num_trajectories, preset.horizon, preset.discount, preset.gae_lambda
    )
    # ProMP needs its own surrogate; "reinforce" is that of the MAML paper.
    parts = rl.losses(problem, inner="lvc" if preset.outer == "promp" else "reinforce")
    model = Model(
        apply_fn=policy_fn,
        loss_fn=parts.loss_fn,
        query_loss_fn=parts.query_loss_fn,
        test_loss_fn=None,
        metric_fn=parts.metric_fn,
        score_fn=None,
        features_fn=None,
        refresh_state=False,
        problem=problem,
        at_step=parts.at_step,
    )
    return Network(model, params, ())


def optimal_return(preset: Preset, tasks: Iterable[Task], num_tasks: int) -> float | None:
    """Returns the mean over tasks of the best expected return, for who knows the task.

    It is None where no formula is known.

    Args:
        preset: the settings.
        tasks: batches of tasks.
        num_tasks: the number of tasks that count.
    """
    formula = environment(preset).optimal_return
    if formula is None:
        return None
    of_batch = jax.jit(jax.vmap(lambda task: formula(task, preset.horizon)))
    found = [np.asarray(of_batch(batch.query.task)) for batch in tasks]
    return float(jnp.concatenate(found)[:num_tasks].mean())
