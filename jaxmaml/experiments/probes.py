"""Measurements beside the score: nearest neighbor, FLOPs, gradient agreement, CG residual.

Every probe takes a learner and tasks, and knows nothing of the experiment.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxmaml
from jaxmaml import diagnostics, dispatch, metrics, parallel, stages
from jaxmaml.averaging import averaged
from jaxmaml.batching import ChunkSize
from jaxmaml.diagnostics import CgResidual
from jaxmaml.types import (
    Array,
    MetaLearner,
    MetaParams,
    MetaState,
    OuterOptimizer,
    PlainFn,
    State,
    Task,
)


def nearest_neighbor_on_pixels(tasks: Iterable[Task], num_tasks: int) -> float:
    """Returns the mean accuracy of the nearest neighbor on the inputs: the floor of any learner.

    Args:
        tasks: batches of tasks.
        num_tasks: the number of tasks that count.
    """
    return _mean(map(_on_pixels, tasks), num_tasks)


def nearest_neighbor_on_features(
    learner: MetaLearner,
    features_fn: PlainFn,
    meta_state: MetaState,
    tasks: Iterable[Task],
    num_tasks: int,
) -> float:
    """Returns the mean accuracy of the nearest neighbor on the features of the unadapted network.

    Args:
        learner: the learner.
        features_fn: `(params, batch) -> [num_examples, num_features]`.
        meta_state: the state of a run; its averaged parameters are used if it has them.
        tasks: batches of tasks.
        num_tasks: the number of tasks that count.
    """
    params = parallel.to_host(averaged(meta_state).params)
    values = (
        _on_features(params, batch, learner=learner, features_fn=features_fn) for batch in tasks
    )
    return _mean(values, num_tasks)


def flops_per_outer_step(
    learner: MetaLearner,
    optimizer: optax.GradientTransformation | OuterOptimizer,
    meta_state: MetaState,
    tasks: Task,
    chunk_size: ChunkSize = "auto",
) -> int:
    """Returns the floating-point operations of one outer step, counted from its jaxpr.

    The loops of a trust region, whose lengths are not known before, count once.
    """
    step = dispatch.make_meta_step(learner, optimizer, chunk_size, None)
    return diagnostics.count_flops(lambda state, tasks: step(state, tasks, None), meta_state, tasks)


def gradient_agreement(
    exact: MetaLearner,
    first: MetaLearner,
    meta_state: MetaState,
    tasks: Task,
    chunk_size: ChunkSize = "auto",
) -> tuple[float, float]:
    """Compares the first-order meta-gradient with the exact one, at the same parameters and tasks.

    Args:
        exact: the learner with the exact meta-gradient.
        first: the same learner with the first-order meta-gradient.
        meta_state: where both gradients are taken.
        tasks: the tasks over which they are taken.
        chunk_size: see `jaxmaml.meta_grad`.

    Returns:
        (the cosine of the angle between them, the norm of the first-order gradient over that of the
        exact one).
    """
    params, state = parallel.to_host((meta_state.params, meta_state.state))
    cosine, ratio = _agreement(
        params, state, tasks, exact=exact, first=first, chunk_size=chunk_size
    )
    return float(cosine), float(ratio)


def cg_residuals(learner: MetaLearner, meta_state: MetaState, tasks: Task) -> CgResidual:
    """Returns the means over tasks of the numbers of `diagnostics.cg_residual`.

    Args:
        learner: a learner with an implicit meta-gradient.
        meta_state: the state of its run; its averaged parameters are used if it has them.
        tasks: the tasks to measure on.
    """

    @jax.jit
    def run(params: MetaParams, state: State, tasks: Task) -> CgResidual:
        residual = lambda task: diagnostics.cg_residual(learner, params, task, state=state)
        return jax.tree.map(jnp.mean, jax.lax.map(residual, tasks))

    params, state = parallel.to_host((averaged(meta_state).params, meta_state.state))
    return jax.tree.map(float, run(params, state, tasks))


def _mean(values: Iterable[Array], num_tasks: int) -> float:
    found = []
    with stages.stage("nearest neighbor on test tasks", num_tasks) as advance:
        for value in values:
            found.append(np.asarray(value))
            advance(len(value))
    return float(np.concatenate(found)[:num_tasks].mean())


_on_pixels = jax.jit(jax.vmap(metrics.nearest_neighbor))


@functools.partial(jax.jit, static_argnames=("learner", "features_fn"))
def _on_features(
    params: MetaParams, tasks: Task, *, learner: MetaLearner, features_fn: PlainFn
) -> Array:
    def accuracy(task: Task) -> Array:
        start, _ = learner.adapt(params, task.support, num_inner_steps=0)
        return metrics.nearest_neighbor(task, lambda batch: features_fn(start, batch))

    return jax.lax.map(accuracy, tasks)


@functools.partial(jax.jit, static_argnames=("exact", "first", "chunk_size"))
def _agreement(
    params: MetaParams,
    state: State,
    tasks: Task,
    *,
    exact: MetaLearner,
    first: MetaLearner,
    chunk_size: ChunkSize,
) -> tuple[Array, Array]:
    options = {"state": state, "chunk_size": chunk_size}
    _, reference, _ = jaxmaml.meta_grad(exact, params, tasks, **options)
    _, grads, _ = jaxmaml.meta_grad(first, params, tasks, **options)
    return diagnostics.agreement(grads, reference)
