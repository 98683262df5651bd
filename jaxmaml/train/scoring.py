"""Scoring parameters on fixed tasks, which are drawn inside `jit` and never all held at once."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxmaml
from jaxmaml import diagnostics, metrics, parallel
from jaxmaml.train import experiment as experiments
from jaxmaml.train import family
from jaxmaml.train.averaging import scored_params
from jaxmaml.train.experiment import Experiment, Spec
from jaxmaml.train.family import Parts
from jaxmaml.types import Array, MetaLearner, MetaState, Params, State, Task


class Score(NamedTuple):
    """A metric over tasks after 0..n inner steps.

    Attributes:
        mean: `[n+1]`, NaN where a task is not finite.
        ci95: half width of the 95 % confidence interval `[n+1]`.
        num_nonfinite: tasks with a value that is not finite.
        headline: the inner step whose value is quoted.
    """

    mean: np.ndarray
    ci95: np.ndarray
    num_nonfinite: int
    headline: int


def score(
    experiment: Experiment, spec: Spec, meta_state: MetaState, part: str, num_tasks: int
) -> Score:
    """Score a run's parameters on the fixed "val" or "test" tasks of an experiment.

    Args:
        experiment: whose sources and metric are used.
        spec: the run: its learner and inner rate.
        meta_state: the run's state, of which the averaged parameters are scored if there are any.
        part: "val" or "test".
        num_tasks: the first so many of the fixed tasks.
    """
    # The mesh that they were trained on need not suit these tasks.
    params, state = jax.device_get((scored_params(meta_state), meta_state.state))
    made_of = experiments.parts(experiment)
    values = [
        _values(params, state, tasks, spec.inner_lr, parts=made_of, learner=spec.learner)
        for tasks in experiments.fixed_tasks(experiment, part, num_tasks)
    ]
    summary = metrics.mean_and_ci95(np.concatenate(values)[:num_tasks])
    return Score(*summary, family.headline_step(experiment.preset, spec.learner))


def floor(experiment: Experiment, num_tasks: int) -> float | None:
    """Accuracy of nearest neighbour on pixels on the test tasks; None for regression."""
    if experiment.preset.is_regression:
        return None
    return _test_mean(experiment, num_tasks, _floors)


def on_features(
    experiment: Experiment, spec: Spec, meta_state: MetaState, num_tasks: int
) -> float | None:
    """Accuracy of nearest neighbour on the features of a run's network before it is adapted.

    None for regression, and where the network carries statistics.
    """
    made_of = experiments.parts(experiment)
    if experiment.preset.is_regression or made_of.model.features_fn is None:
        return None
    params = jax.device_get(scored_params(meta_state))
    values = lambda tasks: _on_features(
        params, tasks, spec.inner_lr, parts=made_of, learner=spec.learner
    )
    return _test_mean(experiment, num_tasks, values)


def _test_mean(experiment: Experiment, num_tasks: int, values: Callable[[Task], Array]) -> float:
    """The mean over the test tasks of what `values` gives for each of some tasks."""
    found = [values(tasks) for tasks in experiments.fixed_tasks(experiment, "test", num_tasks)]
    return float(np.concatenate(found)[:num_tasks].mean())


# The inner rate is an argument, and the order, on which adapting does not depend, is no part of it:
# one program scores all runs of a learner on all splits.
@functools.partial(jax.jit, static_argnames=("parts", "learner"))
def _values(
    params: Params, state: State, tasks: Task, inner_lr: Any, *, parts: Parts, learner: str
) -> Array:
    return parallel.evaluate(
        family.make(parts, learner, "exact", inner_lr),
        parts.model.metric_fn,
        params,
        tasks,
        mesh=parallel.task_mesh(len(jax.tree.leaves(tasks)[0])),
        state=state,
        num_inner_steps=family.num_test_inner_steps(parts.preset, learner),
        chunk_size=experiments.chunk_size(parts.preset),
    )


_floors = jax.jit(jax.vmap(metrics.nearest_neighbour))


@functools.partial(jax.jit, static_argnames=("parts", "learner"))
def _on_features(
    params: Params, tasks: Task, inner_lr: Any, *, parts: Parts, learner: str
) -> Array:
    made, features_fn = family.make(parts, learner, "exact", inner_lr), parts.model.features_fn
    assert features_fn is not None

    def one(task: Task) -> Array:
        start = made.adapt(params, task.support, num_inner_steps=0)[0]
        return metrics.nearest_neighbour(task, lambda batch: features_fn(start, batch))

    return jax.lax.map(one, tasks)


def flops_per_outer_step(experiment: Experiment, learner: MetaLearner) -> int:
    """Floating-point operations of one outer step, counted from its jaxpr."""
    state = jax.eval_shape(
        lambda: jaxmaml.init_state(
            learner, experiment.optimizer, experiment.params, experiment.state
        )
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
    experiment: Experiment, exact: MetaLearner, first: MetaLearner, meta_state: MetaState
) -> tuple[float, float]:
    """First-order against exact meta-gradient, at the same parameters and the tasks of one step.

    Returns:
        (cosine of the angle between them, norm of the first-order one over that of the exact one).
    """
    tasks = experiments.step_tasks(experiment, int(meta_state.step))
    params, state = jax.device_get((meta_state.params, meta_state.state))
    chunk_size = experiments.chunk_size(experiment.preset)
    found = _agreement(params, state, tasks, exact=exact, first=first, chunk_size=chunk_size)
    return float(found[0]), float(found[1])


def cg_residuals(experiment: Experiment, spec: Spec, meta_state: MetaState) -> tuple[float, float]:
    """Of an iMAML, the mean over some test tasks of what `diagnostics.cg_residual` gives."""
    tasks = next(experiments.fixed_tasks(experiment, "test", 1))
    made_of, params = experiments.parts(experiment), jax.device_get(scored_params(meta_state))
    learner = experiments.learner(experiment, spec)

    @jax.jit
    def run(params: Params, tasks: Task) -> Any:
        residual = lambda task: diagnostics.cg_residual(
            learner, made_of.model.loss_fn, params, task, **family.imaml_options(made_of.preset)
        )
        return jax.tree.map(jnp.mean, jax.lax.map(residual, tasks))

    solved, minimum = run(params, tasks)
    return float(solved), float(minimum)


@functools.partial(jax.jit, static_argnames=("exact", "first", "chunk_size"))
def _agreement(
    params: Params,
    state: State,
    tasks: Any,
    *,
    exact: MetaLearner,
    first: MetaLearner,
    chunk_size: Any,
) -> tuple[Array, Array]:
    options = {"state": state, "chunk_size": chunk_size}
    _, reference, _ = jaxmaml.meta_grad(exact, params, tasks, **options)
    _, grads, _ = jaxmaml.meta_grad(first, params, tasks, **options)
    return diagnostics.agreement(grads, reference)
