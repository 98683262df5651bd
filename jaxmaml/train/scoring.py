"""Scoring parameters on fixed tasks, which are drawn inside `jit` and never all held at once."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxmaml
from jaxmaml import diagnostics, metrics, parallel
from jaxmaml.train import experiment as experiments
from jaxmaml.train.experiment import Experiment
from jaxmaml.train.presets import Preset
from jaxmaml.types import Array, LossFn, MetaLearner, Params, Task


class Score(NamedTuple):
    """A metric over tasks after 0..n inner steps.

    Attributes:
        mean: `[n+1]`, NaN where a task is not finite.
        ci95: half width of the 95 % confidence interval `[n+1]`.
        num_nonfinite: tasks with a value that is not finite.
    """

    mean: np.ndarray
    ci95: np.ndarray
    num_nonfinite: int


def score(
    experiment: Experiment, params: Params, inner_lr: float, part: str, num_tasks: int
) -> Score:
    """Score `params` on the fixed "val" or "test" tasks of an experiment.

    Args:
        experiment: whose sources, metric and number of test steps are used.
        params: meta-parameters.
        inner_lr: the inner rate to adapt them with.
        part: "val" or "test".
        num_tasks: the first so many of the fixed tasks.
    """
    preset, metric_fn = experiment.preset, experiment.metric_fn
    params = jax.device_get(params)  # the mesh that they were trained on need not suit these tasks
    values = [
        _values(
            params, tasks, inner_lr, preset=preset, loss_fn=experiment.loss_fn, metric_fn=metric_fn
        )
        for tasks in experiments.fixed_tasks(experiment, part, num_tasks)
    ]
    return Score(*metrics.mean_and_ci95(np.concatenate(values)[:num_tasks]))


def floor(experiment: Experiment, num_tasks: int) -> float | None:
    """Accuracy of nearest neighbour on pixels on the test tasks; None for regression."""
    if experiment.preset.is_regression:
        return None
    values = [_floors(tasks) for tasks in experiments.fixed_tasks(experiment, "test", num_tasks)]
    return float(np.concatenate(values)[:num_tasks].mean())


# The inner rate is an argument and the order, on which adapting does not depend, is not: one
# program scores all runs on all splits.
@functools.partial(jax.jit, static_argnames=("preset", "loss_fn", "metric_fn"))
def _values(
    params: Params, tasks: Task, inner_lr: Any, *, preset: Preset, loss_fn: LossFn, metric_fn: Any
) -> Array:
    return parallel.evaluate(
        experiments.make_learner(preset, loss_fn, "first", inner_lr),
        metric_fn,
        params,
        tasks,
        mesh=parallel.task_mesh(len(jax.tree.leaves(tasks)[0])),
        num_inner_steps=preset.num_test_inner_steps,
        chunk_size=experiments.chunk_size(preset),
    )


_floors = jax.jit(jax.vmap(metrics.nearest_neighbour))


def flops_per_outer_step(experiment: Experiment, learner: MetaLearner) -> int:
    """Floating-point operations of one outer step, counted from its jaxpr."""
    state = jax.eval_shape(
        lambda: jaxmaml.init_state(learner, experiment.optimizer, experiment.params)
    )
    tasks = experiments.step_tasks(experiment, 0)

    def step(state: Any, tasks: Any) -> Any:
        return jaxmaml.meta_step(
            learner,
            experiment.optimizer,
            state,
            tasks,
            chunk_size=experiments.chunk_size(experiment.preset),
        )

    return diagnostics.count_flops(step, state, tasks)


def agreement(
    experiment: Experiment, exact: MetaLearner, first: MetaLearner, params: Params, step: int
) -> tuple[float, float]:
    """First-order against exact meta-gradient, at the same parameters and the tasks of one step.

    Returns:
        (cosine of the angle between them, norm of the first-order one over that of the exact one).
    """
    tasks, params = experiments.step_tasks(experiment, step), jax.device_get(params)
    chunk_size = experiments.chunk_size(experiment.preset)
    cosine, ratio = _agreement(params, tasks, exact=exact, first=first, chunk_size=chunk_size)
    return float(cosine), float(ratio)


@functools.partial(jax.jit, static_argnames=("exact", "first", "chunk_size"))
def _agreement(
    params: Params, tasks: Any, *, exact: MetaLearner, first: MetaLearner, chunk_size: Any
) -> tuple[Array, Array]:
    _, reference, _ = jaxmaml.meta_grad(exact, params, tasks, chunk_size=chunk_size)
    _, grads, _ = jaxmaml.meta_grad(first, params, tasks, chunk_size=chunk_size)
    return diagnostics.agreement(grads, reference)
