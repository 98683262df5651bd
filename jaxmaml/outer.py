"""The outer loop across tasks: the only place that batches them."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmaml import sources, trees
from jaxmaml.checks import check_count
from jaxmaml.sources import Source
from jaxmaml.types import (
    Array,
    Info,
    MetaLearner,
    MetaParams,
    MetaState,
    MetricFn,
    Params,
    Scalar,
    State,
    Task,
    as_stateful,
)

ChunkSize: TypeAlias = int | Literal["auto"] | None
"""The number of tasks computed at once: an integer, "auto" to decide by the device, or None for all."""


def init_state(
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    params: Params,
    state: State = (),
) -> MetaState:
    """Returns the state that `meta_step` starts from.

    Args:
        learner: the meta-learner, whose `init` makes meta-parameters from `params`.
        optimizer: the outer optimizer.
        params: pytree of floating-point arrays: the initial parameters of the model.
        state: the initial state of the loss function, `()` for a loss without one.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> learner = jaxmaml.maml(lambda params, batch: jnp.mean(params**2), optax.sgd(0.1), 1)
        >>> meta_state = jaxmaml.init_state(learner, optax.adam(1e-3), jnp.array([1.0, 2.0]))
        >>> meta_state.params.tolist(), int(meta_state.step)
        ([1.0, 2.0], 0)
    """
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
    axis_name: str | None = None,
) -> tuple[Array, MetaParams, Info]:
    """Returns the meta-loss and its gradient: the (weighted) mean over tasks.

    Args:
        learner: the meta-learner.
        meta_params: what is differentiated.
        tasks: leaves `[num_tasks, ...]`.
        step: the outer step, for schedules and annealing.
        state: the state of the loss function, from which each task starts.
        weights: `[num_tasks]`, not negative and not all zero. Defaults to equal weights. A task of
            weight zero is never computed on, so that it may hold anything, NaN included. Under
            `jit`, weights that are all zero cannot be refused: the loss and the gradient are then NaN.
        chunk_size: how many tasks are computed at once; the memory grows with it. None is all,
            "auto" is decided by the device. The result does not depend on it beyond rounding.
        axis_name: under `shard_map`, the mesh axis over which the tasks are spread.

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
    means, info = _mean_over_tasks(
        learner, meta_params, tasks, step, state, weights, chunk_size, axis_name
    )
    return means.loss, means.grads, info


def meta_step(
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    meta_state: MetaState,
    tasks: Task,
    *,
    weights: Any = None,
    chunk_size: ChunkSize = "auto",
    axis_name: str | None = None,
) -> tuple[MetaState, dict[str, Array]]:
    """Makes one outer step: the meta-gradient over `tasks`, then the outer optimizer.

    Args:
        learner: the meta-learner.
        optimizer: the outer optimizer that `meta_state` was made with.
        meta_state: see `init_state`.
        tasks, weights, chunk_size, axis_name: see `meta_grad`.

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
    means, info = _mean_over_tasks(
        learner, params, tasks, step, state, weights, chunk_size, axis_name
    )
    optimizer = optax.with_extra_args_support(optimizer)
    updates, opt_state = optimizer.update(means.grads, opt_state, params, value=means.loss)
    metrics = {
        "loss": means.loss,
        "query_loss": means.query_loss,
        "grad_norm": optax.tree.norm(means.grads),
    }
    params = optax.apply_updates(params, updates)
    return MetaState(params, opt_state, step + 1, info.state), metrics


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
        mesh: the devices over which the tasks are spread, see `jaxmaml.parallel.task_mesh`. None
            uses one.

    Returns:
        `[num_tasks, num_inner_steps + 1]`, or such leaves; NumPy arrays for a source. Nothing is
        averaged: see `metrics.mean_and_ci95`, which counts the tasks that are not finite.

    Raises:
        ValueError: tasks whose leading axes differ; a source without `num_tasks` or `key`, or one
            that ends too early; tasks that the mesh does not divide evenly.

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
    params, state = _place((params, state), mesh, PartitionSpec())

    def compiled_score(tasks: Task) -> Any:
        if mesh is not None:
            check_divides(check_tasks(tasks), mesh)
            tasks = _place(tasks, mesh, PartitionSpec(mesh.axis_names[0]))
        return _compiled_scores(
            learner, metric_fn, params, state, tasks,
            num_inner_steps=num_inner_steps, chunk_size=chunk_size, mesh=mesh,
        )  # fmt: skip

    return _scores_of_source(compiled_score, tasks, key, num_tasks)


def check_tasks(tasks: Task) -> int:
    """Returns the number of tasks.

    Raises:
        TypeError: `tasks` is not a `Task`.
        ValueError: its leaves do not share one leading task axis.

    Example:
        >>> import jax.numpy as jnp, jaxmaml
        >>> check_tasks(jaxmaml.Task(jnp.zeros((3, 5)), jnp.zeros((3, 15))))
        3
    """
    if not isinstance(tasks, Task):
        raise TypeError(f"tasks must be a Task(support, query); got {type(tasks).__name__}")
    leaves = zip(trees.leaf_paths(tasks), jax.tree.leaves(tasks), strict=True)
    sizes = {path: (jnp.shape(leaf) or (None,))[0] for path, leaf in leaves}
    distinct = set(sizes.values())
    num_tasks = distinct.pop() if len(distinct) == 1 else None
    if num_tasks:
        return num_tasks
    found = ", ".join(f"{path}: {size}" for path, size in sizes.items())
    raise ValueError(
        f"tasks must have one leading task axis of the same, positive size; got {found}"
    )


def task_bytes(
    learner: MetaLearner, meta_params: MetaParams, tasks: Task, state: State = ()
) -> int:
    """Returns an estimate of the memory that one task of a chunk takes, in bytes.

    It is what the backward pass of the meta-loss stores of the forward pass, times two for the
    arrays that it works on.

    Args:
        learner, meta_params, tasks, state: see `meta_grad`; shapes are enough.
    """

    def residuals(meta_params: MetaParams, task: Task, state: State) -> Any:
        loss = lambda meta_params: learner.loss(meta_params, task, state=state)[0]
        return jax.vjp(loss, meta_params)[1]

    task = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tasks)
    stored = jax.tree.leaves(jax.eval_shape(residuals, meta_params, task, state))
    return 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in stored)


def _place(tree: Any, mesh: Mesh | None, spec: PartitionSpec) -> Any:
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, spec))


def _is_finite(source: Source) -> bool:
    return not sources.is_traceable(source) and not hasattr(source, "start")


def _scores_of_source(
    score: Callable[[Task], Any], source: Source, key: Array | None, num_tasks: int | None
) -> Any:
    """The scores of the first tasks of a source, some at a time, as NumPy arrays."""
    wanted = np.inf if num_tasks is None else check_count("num_tasks", num_tasks)
    found, scored = [], 0
    for tasks in sources.batches(source, key):
        found.append(jax.device_get(score(tasks)))
        scored += check_tasks(tasks)
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
        size = _chunk_size(chunk_size, learner, params, tasks, state)

        def score(task: Task) -> Any:
            view = lambda adapted, state: metric(adapted, task.query, state)[0]
            return learner.trace(
                params, task.support, view, state=state, num_inner_steps=num_inner_steps
            )

        if size >= check_tasks(tasks) > 1:
            return jax.vmap(score)(tasks)
        return jax.lax.map(score, tasks, batch_size=size if size > 1 else None)

    num_tasks = check_tasks(tasks)
    if mesh is None:
        return on_a_device(params, state, tasks)
    check_divides(num_tasks, mesh)
    shared, whole = PartitionSpec(mesh.axis_names[0]), PartitionSpec()
    # Nothing is summed over devices, so the check of what varies between them has no meaning.
    return jax.shard_map(
        on_a_device, mesh=mesh, in_specs=(whole, whole, shared), out_specs=shared, check_vma=False
    )(params, state, tasks)


# The learner and the metric are static: equal ones share a program, whatever the source.
_compiled_scores = jax.jit(
    _scores,
    static_argnames=("learner", "metric_fn", "num_inner_steps", "chunk_size", "mesh"),
)


def check_divides(num_tasks: int, mesh: Mesh) -> None:
    """Raises ValueError unless a mesh divides a number of tasks evenly."""
    if num_tasks % mesh.size:
        raise ValueError(
            f"the number of tasks must be a multiple of the mesh's {mesh.size} devices; "
            f"got {num_tasks}"
        )


def _chunk_size(
    chunk_size: ChunkSize, learner: MetaLearner, meta_params: MetaParams, tasks: Task, state: State
) -> int:
    """Returns the number of tasks that are computed at once, 1..num_tasks.

    "auto" is 1 on a CPU, where small working sets are faster and smaller, and elsewhere the number
    that fits into half of the memory of the device.
    """
    num_tasks = check_tasks(tasks)
    if chunk_size is None:
        return num_tasks
    if chunk_size != "auto":
        return min(check_count("chunk_size", chunk_size), num_tasks)
    if jax.default_backend() == "cpu":
        return 1
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", np.inf)
    fitting = limit / 2 / task_bytes(learner, meta_params, tasks, state)
    return int(min(num_tasks, max(1, fitting)))


def _check_weights(weights: Any, num_tasks: int) -> Array:
    """The weights, in float32 at least."""
    weights = jnp.asarray(weights)
    if weights.shape != (num_tasks,):
        raise ValueError(f"weights must be [num_tasks] = [{num_tasks}]; got {list(weights.shape)}")
    # In NumPy: under jit, JAX would trace the check even if the caller's weights are known.
    known = None if isinstance(weights, Tracer) else np.asarray(weights)
    if known is not None and not (known.min() >= 0 < known.max()):
        raise ValueError("weights must be finite, not negative and not all zero")
    return weights.astype(jnp.promote_types(weights.dtype, jnp.float32))


class _Means(NamedTuple):
    """Means over tasks, in the types of the meta-parameters and the losses."""

    loss: Array
    query_loss: Array
    grads: MetaParams


class _Sums(NamedTuple):
    """Weighted sums over tasks, in float32 at least. `state` has the floating-point leaves only."""

    weight: Array
    loss: Array
    query_loss: Array
    grads: MetaParams
    state: State


def _mean_over_tasks(
    learner: MetaLearner,
    params: MetaParams,
    tasks: Task,
    step: Scalar,
    state: State,
    weights: Any,
    chunk_size: ChunkSize,
    axis_name: str | None,
) -> tuple[_Means, Info]:
    """Sums over chunks and devices, then one division."""
    # A task of weight zero is replaced by one that counts: whatever it holds is never computed on.
    num_tasks = check_tasks(tasks)
    size = _chunk_size(chunk_size, learner, params, tasks, state)
    if weights is None:
        weights = jnp.ones(num_tasks)
    else:
        weights = _check_weights(weights, num_tasks)
        tasks = _take(tasks, jnp.where(weights > 0, jnp.arange(num_tasks), jnp.argmax(weights > 0)))

    # What the devices share is marked as one copy each: otherwise JAX would sum each gradient of it
    # over the devices by itself.
    if axis_name is not None:
        params, state, step = _varying((params, state, step), axis_name)
    chunk_sums = functools.partial(_chunk_sums, learner, params, step, state)
    sums, info = _sum_over_chunks(chunk_sums, tasks, weights, size, axis_name)
    if axis_name is not None:
        sums = jax.lax.psum(sums, axis_name)

    # Means in the types that the caller knows.
    means = jax.tree.map(lambda total: total / sums.weight, sums)
    cast = lambda mean, like: mean.astype(like.dtype)
    grads = jax.tree.map(cast, means.grads, params)
    loss, query_loss = (cast(mean, info.query_loss) for mean in (means.loss, means.query_loss))
    carried = trees.combine(_in_types_of(state, means.state), info.state)
    return _Means(loss, query_loss, grads), info._replace(state=carried)


def _chunk_sums(
    learner: MetaLearner,
    params: MetaParams,
    step: Scalar,
    state: State,
    tasks: Task,
    weights: Array,
) -> tuple[_Sums, Info]:
    """The sums of one chunk, and its Info, whose state has the leaves that cannot be summed."""

    def weighted_loss(params: MetaParams) -> tuple[Array, Info]:
        task_loss = lambda task: learner.loss(params, task, step=step, state=state)
        losses, info = _vmap(task_loss, weights.size)(tasks)
        return jnp.sum(weights * losses), info

    (loss, info), grads = jax.value_and_grad(weighted_loss, has_aux=True)(params)

    # Counters and keys of the state are those of the first task; the rest is summed.
    floats, others = trees.partition(info.state, trees.is_float(info.state))
    first_of_others = jax.tree.map(lambda leaf: leaf[0], others)
    total = lambda leaf: jnp.tensordot(weights, leaf.astype(weights.dtype), axes=1)
    sums = _Sums(
        weight=jnp.sum(weights),
        loss=loss,
        query_loss=total(info.query_loss),
        grads=_in_float32(grads),
        state=jax.tree.map(total, floats),
    )

    # A chunk without weight has stand-ins, which on a device of its own may hold anything.
    sums = jax.tree.map(lambda leaf: jnp.where(jnp.any(weights > 0), leaf, 0), sums)
    return sums, info._replace(state=first_of_others)


def _sum_over_chunks(
    chunk_sums: Callable[[Task, Array], tuple[_Sums, Info]],
    tasks: Task,
    weights: Array,
    size: int,
    axis_name: str | None,
) -> tuple[_Sums, Info]:
    """The sums over all tasks, `size` of them at a time."""
    num_tasks = weights.size
    if size == num_tasks:
        return chunk_sums(tasks, weights)

    # Chunks of equal size; the last one is filled up with tasks of weight zero.
    num_chunks = -(-num_tasks // size)
    if num_chunks * size > num_tasks:
        index = jnp.arange(num_chunks * size)
        tasks = _take(tasks, jnp.minimum(index, num_tasks - 1))
        weights = jnp.pad(weights, (0, num_chunks * size - num_tasks))
    split = lambda leaf: leaf.reshape(num_chunks, size, *leaf.shape[1:])
    chunks = jax.tree.map(split, (tasks, weights))

    # A scan that adds them up.
    def add(total: _Sums, chunk: tuple[Task, Array]) -> tuple[_Sums, Info]:
        sums, info = chunk_sums(*chunk)
        return jax.tree.map(jnp.add, total, sums), info

    shapes, _ = jax.eval_shape(chunk_sums, *jax.tree.map(lambda leaf: leaf[0], chunks))
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    if axis_name is not None:
        zeros = _varying(zeros, axis_name)
    sums, infos = jax.lax.scan(add, zeros, chunks)

    # What is reported per task, in the order of the tasks.
    state = jax.tree.map(lambda leaf: leaf[-1], infos.state)
    join = lambda leaf: leaf.reshape(num_chunks * size, *leaf.shape[2:])[:num_tasks]
    return sums, jax.tree.map(join, infos._replace(state=()))._replace(state=state)


def _vmap(function: Callable[[Task], Any], size: int) -> Callable[[Task], Any]:
    """`jax.vmap` without an axis of length one, which XLA would carry through every operation."""
    if size > 1:
        return jax.vmap(function)

    def single(tasks: Task) -> Any:
        out = function(jax.tree.map(lambda leaf: leaf[0], tasks))
        return jax.tree.map(lambda leaf: leaf[None], out)

    return single


def _in_types_of(state: State, means: State) -> State:
    """The mean of the floating-point state, in the types of the state that was carried in."""
    floats = trees.partition(state, trees.is_float(state))[0]
    if jax.tree.structure(floats) != jax.tree.structure(means):
        raise ValueError(
            "the loss function returned a state of another structure than the one it was given: "
            "pass the model's initial state to init_state or meta_grad, and return a state like it"
        )
    return jax.tree.map(lambda mean, like: mean.astype(jnp.result_type(like)), means, floats)


def _in_float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def _take(tasks: Task, index: Array) -> Task:
    return jax.tree.map(lambda leaf: leaf[index], tasks)


def _varying(tree: Any, axis_name: str) -> Any:
    """Marks what all devices of the mesh axis share as one copy each."""
    return jax.tree.map(lambda leaf: jax.lax.pcast(leaf, axis_name, to="varying"), tree)
