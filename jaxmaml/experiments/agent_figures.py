"""The plots of a run directory that show what a policy does, before and after its adaptation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from jaxmaml import rl
from jaxmaml.averaging import averaged
from jaxmaml.experiments import agent_plots
from jaxmaml.experiments.experiment import Experiment, scored_tasks
from jaxmaml.experiments.run import Run
from jaxmaml.types import Array, Params, Task

NUM_TASKS = 3
"""The tasks whose trajectories are drawn."""
NUM_TRAJECTORIES = 5
"""The trajectories that are drawn of each of them."""
NUM_FRAMES = 7
"""The pictures of the half-cheetah."""


def draw(experiment: Experiment, run: Run) -> dict[str, Figure]:
    """Returns the plots of a policy in some test tasks, by name.

    Args:
        experiment: what the runs share.
        run: the run that is shown.
    """
    preset = experiment.preset
    if preset.dataset == "nav2d":
        return {"trajectories": _trajectories(experiment, run)}
    if preset.dataset in ("bandits", "tabular-mdp"):
        return {"actions": _actions(experiment, run)}
    return {"frames": _frames(experiment, run)}


def _trajectories(experiment: Experiment, run: Run) -> Figure:
    """Draws the trajectories of a point before and after each inner step."""
    problem = run.candidate.model.problem
    assert problem is not None
    few = problem._replace(num_trajectories=NUM_TRAJECTORIES)

    def positions(params: Params, request: rl.Request) -> Array:
        found = few.sample(params, request)
        return jnp.where(found.mask[..., None] > 0, found.observations, jnp.nan)

    tasks = _tasks(experiment, NUM_TASKS)
    by_step = np.asarray(_after_each_step(run, tasks, positions))
    shown = [dict(zip(_stages(run), found, strict=True)) for found in by_step]
    return agent_plots.trajectories(shown, np.asarray(tasks.query.task))


def _actions(experiment: Experiment, run: Run) -> Figure:
    """Draws the probabilities of the actions before and after each inner step, in one task."""
    problem = run.candidate.model.problem
    assert problem is not None
    observations = jnp.eye(problem.environment.observation_size)

    def probabilities(params: Params, request: rl.Request) -> Array:
        del request
        return jax.nn.softmax(problem.policy_fn(params, observations).logits)

    tasks = _tasks(experiment, 1)
    (by_step,) = np.asarray(_after_each_step(run, tasks, probabilities))
    task = tasks.query.task
    rewards = task.rewards[0] if isinstance(task, rl.TabularTask) else task
    return agent_plots.action_probabilities(
        dict(zip(_stages(run), by_step, strict=True)), np.asarray(rewards)
    )


def _frames(experiment: Experiment, run: Run) -> Figure:
    """Draws the half-cheetah at some moments, with the mean actions of an adapted policy."""
    problem, final = run.candidate.model.problem, averaged(run.meta_state)
    assert problem is not None
    env, policy_fn = problem.environment, problem.policy_fn
    last = run.candidate.num_test_inner_steps

    @jax.jit
    def states(params: Any, task: Task) -> Any:
        adapted, _ = run.candidate.learner.adapt(params, task.support, num_inner_steps=last)
        state, observation = env.reset(task.query.key, task.query.task)

        def advance(carry: Any, key: Array) -> Any:
            state, observation = carry
            action = policy_fn(adapted, observation).mean
            step = env.step(key, state, action, task.query.task)
            return (step.state, step.observation), step.state

        keys = jax.random.split(task.query.key, problem.horizon)
        return jax.lax.scan(advance, (state, observation), keys)[1]

    task = jax.tree.map(lambda leaf: leaf[0], _tasks(experiment, 1))
    shown = np.unique(np.linspace(0, problem.horizon - 1, NUM_FRAMES).astype(int))
    found = jax.tree.map(lambda leaf: leaf[shown], states(final.params, task))
    return rl.draw_cheetah(rl.cheetah_segments(found), [f"step {i + 1}" for i in shown])


def _after_each_step(run: Run, tasks: Task, fn: Any) -> Any:
    """Returns `fn(params, request)` for each task after 0..n inner steps, `[num_tasks, n + 1, ...]`."""
    final = averaged(run.meta_state)
    learner = run.candidate.learner

    @jax.jit
    def run_all(params: Any, tasks: Task) -> Any:
        def one(task: Task) -> Any:
            view = lambda params, state: fn(params, task.query)
            return learner.trace(
                params, task.support, view, num_inner_steps=run.candidate.num_test_inner_steps
            )

        return jax.lax.map(one, tasks)

    return run_all(final.params, tasks)


def _stages(run: Run) -> list[str]:
    numbers = range(1, run.candidate.num_test_inner_steps + 1)
    return ["before", *(f"after {i} step{'s' * (i != 1)}" for i in numbers)]


def _tasks(experiment: Experiment, number: int) -> Task:
    tasks = next(scored_tasks(experiment, "test", number))
    return jax.tree.map(lambda leaf: leaf[:number], tasks)
