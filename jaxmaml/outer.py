"""The outer loop across tasks: meta-gradients, outer steps and evaluation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from jaxmaml import parallel, sources, stages, trees
from jaxmaml.batching import (
    TASKS,
    ChunkSize,
    Means,
    check_tasks,
    check_weights,
    chunk_size_of,
    mean_over_tasks,
    watch_convolutions,
)
from jaxmaml.checks import check_count
from jaxmaml.collectives import Axis, dims_of
from jaxmaml.sources import Source
from jaxmaml.types import (
    Array,
    Info,
    MetaLearner,
    MetaParams,
    MetaState,
    MetricFn,
    OuterOptimizer,
    Params,
    Scalar,
    State,
    Stream,
    Task,
    as_stateful,
)

METRICS: tuple[str, ...] = ("loss", "query_loss", "grad_norm")
"""The metrics of `meta_step`."""


def init_state(
    learner: MetaLearner,
    optimizer: optax.GradientTransformation | OuterOptimizer,
    params: Params,
    state: State = (),
) -> MetaState:
    """Returns the state that `meta_step` starts from.

    Args:
        learner: the meta-learner, whose `init` makes meta-parameters from `params`.
        optimizer: the outer optimizer, of optax or one that makes the whole step, as `jaxmaml.rl.trpo`.
        params: pytree of floating-point arrays: the initial parameters of the model.
        state: the initial state of the loss function, `()` for a loss without one.

    Raises:
        ValueError: no parameters.
        TypeError: parameters that are not floating-point.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> learner = jaxmaml.maml(lambda params, batch: jnp.mean(params**2), optax.sgd(0.1), 1)
        >>> meta_state = jaxmaml.init_state(learner, optax.adam(1e-3), jnp.array([1.0, 2.0]))
        >>> meta_state.params.tolist(), int(meta_state.step)
        ([1.0, 2.0], 0)
    """
    trees.check_params(params)
    meta_params = learner.init(params)
    return MetaState(meta_params, optimizer.init(meta_params), jnp.zeros((), jnp.int32), state)


def meta_grad(
    learner: MetaLearner,
    meta_params: MetaParams,
    tasks: Task,
    *,
    step: Scalar = 0,
    state: State = (),
    weights: Any = None,
    chunk_size: ChunkSize = "auto",
    mesh: Mesh | None = None,
    specs: Any = None,
    axis_name: str | None = None,
) -> tuple[Array, MetaParams, Info]:
    """Returns the meta-loss and its gradient: the (weighted) mean over tasks.

    Args:
        learner: the meta-learner.
        meta_params: what is differentiated.
        tasks: leaves `[num_tasks, ...]`.
        step: the outer step, for schedules and annealing.
        state: the state of the loss function, from which each task starts.
        weights: `[num_tasks]`, finite, not negative and not all zero. Defaults to equal weights. A
            task of weight zero is never computed on, so that it may hold anything, NaN included.
            Under `jit`, where wrong weights cannot be refused, they make the loss and the gradient
            NaN.
        chunk_size: how many tasks are computed at once; the memory grows with it. None is all,
            "auto" is decided by the device. The result does not depend on it beyond rounding.
        mesh: the devices over which the tasks are spread, see `jaxmaml.parallel.make_mesh`. None uses
            one. The result does not depend on it beyond rounding; it need not divide the tasks. On a
            CPU, wait for one call (`jax.block_until_ready`) before the next: concurrent programs can
            deadlock, since each waits for all devices while it holds threads that the others need.
        specs: how `meta_params` are split over the mesh, and the gradient with them, see
            `jaxmaml.parallel.split_specs`. None is a copy of all on every device.
        axis_name: in place of a mesh inside your own `shard_map`, the mesh axis over which the tasks
            are spread. Pass `check_vma=False` to `shard_map`: its check refuses loops that start from
            a constant, such as the counters of an optimizer or the first state of a recurrent network.

    Returns:
        (loss, gradient like `meta_params`, Info with query_loss `[num_tasks]`, inner_losses
        `[num_tasks, num_inner_steps]` and the mean state). In place of a task of weight zero, another
        task is reported.

    Raises:
        ValueError: leading task axes that differ, no tasks, a chunk_size that is not positive, or
            weights that are negative, all zero or of another length.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2) / 2
        >>> learner = jaxmaml.maml(loss_fn, optax.sgd(0.5), 1)
        >>> tasks = jaxmaml.Task(support=jnp.ones((3, 4)), query=jnp.ones((3, 4)))
        >>> loss, grad, info = jaxmaml.meta_grad(learner, jnp.array(0.0), tasks)
        >>> float(loss), float(grad), info.query_loss.shape
        (0.125, -0.25, (3,))
    """
    means, info, _ = _means(
        learner, meta_params, tasks, step=step, state=state, weights=weights,
        chunk_size=chunk_size, mesh=mesh, specs=specs, axis_name=axis_name,
    )  # fmt: skip
    return means.loss, means.grads, info


def meta_step(
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    meta_state: MetaState,
    tasks: Task,
    *,
    weights: Any = None,
    chunk_size: ChunkSize = "auto",
    mesh: Mesh | None = None,
    specs: Any = None,
    axis_name: str | None = None,
) -> tuple[MetaState, dict[str, Array]]:
    """Makes one outer step: the meta-gradient over `tasks`, then the outer optimizer.

    Args:
        learner: the meta-learner.
        optimizer: the outer optimizer that `meta_state` was made with.
        meta_state: see `init_state`.
        tasks, weights, chunk_size, mesh, specs, axis_name: see `meta_grad`. Where parameters are split,
            the optimizer computes on the parts, in one program that XLA divides: a norm over all
            parameters, for example, is that of all parts.

    Returns:
        The next state, and the scalars "loss" (what was differentiated), "query_loss" (mean over
        tasks) and "grad_norm" (of the meta-gradient, over the whole tree).

    Raises:
        ValueError: as in `meta_grad`.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2) / 2
        >>> learner = jaxmaml.maml(loss_fn, optax.sgd(0.5), 1)
        >>> tasks = jaxmaml.Task(support=jnp.ones((3, 4)), query=jnp.ones((3, 4)))
        >>> optimizer = optax.sgd(1.0)
        >>> meta_state = jaxmaml.init_state(learner, optimizer, jnp.array(0.0))
        >>> meta_state, metrics = jaxmaml.meta_step(learner, optimizer, meta_state, tasks)
        >>> float(meta_state.params), int(meta_state.step), float(metrics["grad_norm"])
        (0.25, 1, 0.25)
    """
    params, opt_state, step, state = meta_state
    means, info, grad_norm = _means(
        learner, params, tasks, step=step, state=state, weights=weights,
        chunk_size=chunk_size, mesh=mesh, specs=specs, axis_name=axis_name,
    )  # fmt: skip
    optimizer = optax.with_extra_args_support(optimizer)
    updates, opt_state = optimizer.update(means.grads, opt_state, params, value=means.loss)
    values = means.loss, means.query_loss, grad_norm
    metrics = dict(zip(METRICS, values, strict=True))
    params = optax.apply_updates(params, updates)
    return MetaState(params, opt_state, step + 1, info.state), metrics


def _means(
    learner: MetaLearner,
    params: MetaParams,
    tasks: Task,
    *,
    step: Scalar,
    state: State,
    weights: Any,
    chunk_size: ChunkSize,
    mesh: Mesh | None,
    specs: Any,
    axis_name: str | None,
) -> tuple[Means, Info, Array]:
    """The means over tasks, on one device or several, and the norm of the gradient."""
    axis = None if axis_name is None else Axis(axis_name)
    if mesh is None:
        means, info = mean_over_tasks(
            learner, params, tasks, step, state, weights, chunk_size, axis
        )
        return means, info, trees.norm(means.grads)

    # Fill up the devices with tasks of weight zero.
    num_tasks = check_tasks(tasks)
    weights = None if weights is None else check_weights(weights, num_tasks)
    tasks, weights = parallel.evened(tasks, weights, mesh)

    # Each device has its share of the tasks, and its part of the parameters or all of them.
    shared, whole = PartitionSpec(TASKS), PartitionSpec()
    parts = whole if specs is None else parallel.along_tasks(specs)
    means_specs: Any = Means(loss=whole, query_loss=whole, grads=parts)  # pyright: ignore[reportArgumentType]
    axis = Axis(TASKS, None if specs is None else dims_of(specs, TASKS))

    def on_a_device(
        params: MetaParams, step: Scalar, state: State, tasks: Task, weights: Any
    ) -> tuple[Means, Info, Array]:
        means, info = mean_over_tasks(
            learner, axis.whole(params), tasks, step, state, weights, chunk_size, axis
        )
        return means, info, axis.norm(means.grads)

    # JAX's check of what varies between devices refuses every loop or branch that starts from a fresh
    # constant. What is returned as a whole is the same on all devices, since it was summed over them.
    means, info, norm = jax.shard_map(
        on_a_device, mesh=mesh, axis_names={TASKS}, check_vma=False,
        in_specs=(parts, whole, whole, shared, shared),
        out_specs=(means_specs, Info(shared, shared, whole), whole),
    )(params, step, state, tasks, weights)  # fmt: skip
    per_task = jax.tree.map(lambda leaf: leaf[:num_tasks], info._replace(state=()))
    return means, per_task._replace(state=info.state), norm


def evaluate(
    learner: MetaLearner,
    metric_fn: MetricFn,
    meta_state: MetaState,
    tasks: Task | Source,
    *,
    num_tasks: int | None = None,
    key: Array | None = None,
    num_inner_steps: int | None = None,
    chunk_size: ChunkSize = "auto",
    mesh: Mesh | None = None,
) -> Any:
    """Returns `metric_fn` on the query after every inner step 0..n, for every task.

    Args:
        learner: the meta-learner.
        metric_fn: `(adapted, query) -> metric`, a scalar or a pytree of arrays, or a metric that
            `jaxmaml.with_state` marks; `nn.accuracy` and the losses of `jaxmaml.nn` are metrics.
        meta_state: see `init_state`.
        tasks: leaves `[num_tasks, ...]`, or a source as `fit` takes it, which is read some tasks at
            a time.
        num_tasks: how many tasks of a source to score. None scores all tasks of an iterable.
        key: typed PRNG key of a source that is a function or a stream.
        num_inner_steps: inner steps n. Defaults to those of training.
        chunk_size: how many tasks are computed at once, as in `meta_grad`.
        mesh: the devices over which the tasks are spread, see `jaxmaml.parallel.make_mesh`. None
            uses one. With several processes, an iterable gives each of them the tasks of its share,
            see `jaxmaml.parallel.share_of`; the other sources do so by themselves.

    Returns:
        `[num_tasks, num_inner_steps + 1]`, or such leaves; NumPy arrays for a source. Nothing is
        averaged: see `metrics.mean_and_ci95`, which counts the tasks that are not finite.

    Raises:
        TypeError: `meta_state` is not a `MetaState`; for a source, `learner` or `metric_fn` cannot be
            hashed, as the program is kept for the next call.
        ValueError: tasks whose leading axes differ; a source without `num_tasks` or `key`, or one
            that ends too early.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params * batch["inputs"] - batch["targets"]) ** 2)
        >>> learner = jaxmaml.maml(loss_fn, optax.sgd(0.01), 2)
        >>> meta_state = jaxmaml.init_state(learner, optax.sgd(0.1), jnp.array(0.0))
        >>> source = jaxmaml.data.sinusoid.sampler(num_tasks=20, shot=5, query=10)
        >>> key = jax.random.key(0)
        >>> scores = jaxmaml.evaluate(learner, loss_fn, meta_state, source, num_tasks=50, key=key)
        >>> scores.shape
        (50, 3)
    """
    if not isinstance(meta_state, MetaState):
        raise TypeError(
            "meta_state must be a MetaState, as init_state and fit return it; "
            f"got {type(meta_state).__name__}"
        )

    # The tasks themselves: this part can be traced.
    params, state = meta_state.params, meta_state.state
    if isinstance(tasks, Task):
        if num_tasks is not None or key is not None:
            raise ValueError("num_tasks and key are for a source of tasks; these are the tasks")
        return _scores(
            learner, metric_fn, params, state, tasks,
            num_inner_steps=num_inner_steps, chunk_size=chunk_size, mesh=mesh,
        )  # fmt: skip

    # A source: one compiled program serves all sources.
    if num_tasks is None and not _is_finite(tasks):
        raise ValueError("num_tasks must be given: this source has no end")
    if mesh is not None:
        params, state = parallel.place((params, state), mesh)

    def compiled_score(tasks: Task) -> Any:
        weights = None
        if mesh is not None:
            tasks, weights = parallel.spread(tasks, mesh)
        scores = _compiled_scores(
            learner, metric_fn, params, state, tasks,
            num_inner_steps=num_inner_steps, chunk_size=chunk_size, mesh=mesh,
        )  # fmt: skip
        scores, weights = parallel.to_host((scores, weights))
        return scores if weights is None else jax.tree.map(lambda leaf: leaf[weights > 0], scores)

    share = (0, 1) if mesh is None else parallel.share_of(mesh)
    return _scores_of_source(compiled_score, tasks, key, num_tasks, share)


def _is_finite(source: Source) -> bool:
    return not sources.is_traceable(source) and not isinstance(source, Stream)


def _scores_of_source(
    score: Callable[[Task], Any],
    source: Source,
    key: Array | None,
    num_tasks: int | None,
    share: tuple[int, int],
) -> Any:
    """The scores of the first tasks of a source, some at a time, as NumPy arrays."""
    wanted = np.inf if num_tasks is None else check_count("num_tasks", num_tasks)
    found, scored = [], 0
    with stages.stage("scoring tasks", num_tasks) as advance:
        for tasks in sources.batches(source, key, share=share):
            found.append(score(tasks))
            number = jax.tree.leaves(found[-1])[0].shape[0]
            advance(number)
            scored += number
            if scored >= wanted:
                break
    if scored < (num_tasks or 1):
        raise ValueError(f"the source ended after {scored} tasks; num_tasks={num_tasks}")
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:num_tasks], *found)


def _scores(
    learner: MetaLearner,
    metric_fn: MetricFn,
    params: MetaParams,
    state: State,
    tasks: Task,
    *,
    num_inner_steps: int | None,
    chunk_size: ChunkSize,
    mesh: Mesh | None,
) -> Any:
    """The scores of some tasks, on one device or spread over a mesh."""
    metric = as_stateful(metric_fn)

    def on_a_device(params: MetaParams, state: State, tasks: Task) -> Any:
        size = chunk_size_of(chunk_size, learner, params, tasks, state)

        def score(task: Task) -> Any:
            view = lambda adapted, state: metric(adapted, task.query, state)[0]
            return learner.trace(
                params, task.support, view, state=state, num_inner_steps=num_inner_steps
            )

        if size >= check_tasks(tasks) > 1:
            scores = jax.vmap(score)
        else:
            scores = lambda tasks: jax.lax.map(score, tasks, batch_size=size if size > 1 else None)
        return watch_convolutions(scores, size)(tasks)

    if mesh is None:
        return on_a_device(params, state, tasks)
    num_tasks = check_tasks(tasks)
    tasks, _ = parallel.evened(tasks, None, mesh)
    shared, whole = PartitionSpec(TASKS), PartitionSpec()
    # Nothing is summed over devices, so the check of what varies between them has no meaning.
    scores = jax.shard_map(
        on_a_device, mesh=mesh, axis_names={TASKS}, check_vma=False,
        in_specs=(whole, whole, shared), out_specs=shared,
    )(params, state, tasks)  # fmt: skip
    return jax.tree.map(lambda leaf: leaf[:num_tasks], scores)


# The learner and the metric are static: the same objects share a program, whatever the source.
_compiled_scores = jax.jit(
    _scores,
    static_argnames=("learner", "metric_fn", "num_inner_steps", "chunk_size", "mesh"),
)
