"""Across tasks: the only place that batches them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jaxmaml.types import Array, Info, MetaLearner, MetaParams, MetaState, Params, State, Task


def init_state(
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    params: Params,
    state: State = (),
) -> MetaState:
    """What `meta_step` starts from.

    Args:
        learner: the meta-learner, whose `init` makes meta-parameters of `params`.
        optimizer: the outer optimiser.
        params: pytree of floating-point arrays: the model's initial parameters.
        state: what the loss function carries, `()` for none.
    """
    meta_params = learner.init(params)
    return MetaState(meta_params, optimizer.init(meta_params), jnp.zeros((), jnp.int32), state)


def meta_grad(
    learner: MetaLearner,
    meta_params: MetaParams,
    tasks: Task,
    *,
    step: Any = 0,
    state: State = (),
    weights: Any = None,
    chunk_size: int | str | None = "auto",
    axis_name: str | None = None,
) -> tuple[Array, MetaParams, Info]:
    """The meta-loss and its gradient: the (weighted) mean over tasks.

    Args:
        learner: the meta-learner.
        meta_params: what is differentiated.
        tasks: leaves `[num_tasks, ...]`.
        step: the outer step, for learners that follow a schedule.
        state: what the loss function carries; each task starts from it.
        weights: `[num_tasks]`, not negative and not all zero; None weighs every task alike. A task of
            weight zero is never computed on, so that it may hold anything, NaN included. Under `jit`
            weights that are all zero cannot be refused: the loss and the gradient are then NaN.
        chunk_size: how many tasks are computed at once; memory grows with it. None is all, "auto"
            goes by the backend. The result does not depend on it beyond rounding.
        axis_name: under `shard_map`, the mesh axis over which the tasks are spread.

    Returns:
        (loss, gradient like `meta_params`, Info with query_loss `[num_tasks]`, inner_losses
        `[num_tasks, num_inner_steps]` and the mean state). A task of weight zero reports what the
        task that stands in for it gives.

    Raises:
        ValueError: leading task axes that differ, no tasks, a chunk_size that is not positive,
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
    loss, _, grads, info = _mean_over_tasks(
        learner, meta_params, tasks, step, state, weights, chunk_size, axis_name
    )
    return loss, grads, info


def meta_step(
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    meta_state: MetaState,
    tasks: Task,
    *,
    weights: Any = None,
    chunk_size: int | str | None = "auto",
    axis_name: str | None = None,
) -> tuple[MetaState, dict[str, Array]]:
    """One outer step: the meta-gradient over `tasks`, then the outer optimiser.

    Args:
        learner: the meta-learner.
        optimizer: the outer optimiser that `meta_state` was made with.
        meta_state: see `init_state`.
        tasks, weights, chunk_size, axis_name: see `meta_grad`.

    Returns:
        The next state, and the scalars "loss" (what was differentiated), "query_loss" (mean over
        tasks) and "grad_norm" (of the meta-gradient, over the whole tree).

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
    loss, query_loss, grads, info = _mean_over_tasks(
        learner, params, tasks, step, state, weights, chunk_size, axis_name
    )
    optimizer = optax.with_extra_args_support(optimizer)
    updates, opt_state = optimizer.update(grads, opt_state, params, value=loss)
    metrics = {"loss": loss, "query_loss": query_loss, "grad_norm": optax.tree.norm(grads)}
    params = optax.apply_updates(params, updates)
    return MetaState(params, opt_state, step + 1, info.state), metrics


def evaluate(
    learner: MetaLearner,
    metric_fn: Callable[..., Any],
    meta_params: MetaParams,
    tasks: Task,
    *,
    state: State = (),
    num_inner_steps: int | None = None,
    chunk_size: int | str | None = "auto",
) -> Any:
    """`metric_fn` on the query after every inner step 0..n, for every task.

    Args:
        learner: the meta-learner.
        metric_fn: `(adapted, query) -> metric`, with a learner that carries state
            `(adapted, query, state) -> metric`; a scalar or a pytree of arrays.
        meta_params: see `init_state`.
        tasks: leaves `[num_tasks, ...]`.
        state: what the loss function carries.
        num_inner_steps: None is as in training.
        chunk_size: how many tasks are computed at once, as in `meta_grad`.

    Returns:
        `[num_tasks, num_inner_steps + 1]`, or such leaves. Nothing is averaged: see
        `metrics.mean_and_ci95`, which counts the tasks that are not finite.
    """
    num_tasks = check_tasks(tasks)
    size = _chunk_size(chunk_size, learner, meta_params, tasks, state)

    def score(task):
        def view(adapted, *state):
            return metric_fn(adapted, task.query, *state)

        return learner.trace(
            meta_params, task.support, view, state=state, num_inner_steps=num_inner_steps
        )

    if size >= num_tasks > 1:
        return jax.vmap(score)(tasks)
    return jax.lax.map(score, tasks, batch_size=size if size > 1 else None)


def check_tasks(tasks: Task) -> int:
    """The number of tasks; ValueError unless every leaf has the same leading task axis."""
    if not isinstance(tasks, Task):
        raise TypeError(f"tasks must be a Task(support, query); got {type(tasks).__name__}")
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): (jnp.shape(leaf) or (None,))[0]
        for path, leaf in jax.tree.leaves_with_path(tasks)
    }
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
    """An estimate of the memory that one task of a chunk takes.

    What the backward pass of the meta-loss keeps of the forward pass, times two for what it works on.

    Args:
        learner, meta_params, tasks, state: see `meta_grad`; shapes will do.
    """

    def residuals(meta_params, task, state):
        loss = lambda meta_params: learner.loss(meta_params, task, state=state)[0]
        return jax.vjp(loss, meta_params)[1]

    task = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tasks)
    kept = jax.tree.leaves(jax.eval_shape(residuals, meta_params, task, state))
    return 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in kept)


def _chunk_size(chunk_size, learner, meta_params, tasks, state):
    """How many tasks are computed at once, 1..num_tasks.

    "auto" is 1 on CPU, where small working sets win in time and memory, and elsewhere as many as fit
    into half of the device's memory.
    """
    num_tasks = check_tasks(tasks)
    if chunk_size == "auto" and jax.default_backend() == "cpu":
        return 1
    if chunk_size == "auto":
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", np.inf)
        fitting = limit / 2 / task_bytes(learner, meta_params, tasks, state)
        return int(min(num_tasks, max(1, fitting)))
    if chunk_size is None:
        return num_tasks
    is_int = isinstance(chunk_size, int | np.integer) and not isinstance(chunk_size, bool)
    if not is_int or chunk_size < 1:
        raise ValueError(
            f"chunk_size must be a positive integer, None or 'auto'; got {chunk_size!r}"
        )
    return min(int(chunk_size), num_tasks)


def _check_weights(weights: Any, num_tasks: int) -> Array:
    weights = jnp.asarray(weights)
    if weights.shape != (num_tasks,):
        raise ValueError(f"weights must be [num_tasks] = [{num_tasks}]; got {list(weights.shape)}")
    # In NumPy: under jit, JAX would trace the check even where the caller's weights are known.
    known = None if isinstance(weights, Tracer) else np.asarray(weights)
    if known is not None and not (known.min() >= 0 < known.max()):
        raise ValueError("weights must be finite, not negative and not all zero")
    return weights.astype(jnp.promote_types(weights.dtype, jnp.float32))


def _mean_over_tasks(learner, params, tasks, step, state, weights, chunk_size, axis_name):
    """(loss, mean query loss, gradient, Info): sums over chunks and devices, then one division."""
    num_tasks = check_tasks(tasks)
    size = _chunk_size(chunk_size, learner, params, tasks, state)
    if weights is not None:
        weights = _check_weights(weights, num_tasks)
        tasks = _take(tasks, jnp.where(weights > 0, jnp.arange(num_tasks), jnp.argmax(weights > 0)))
    if axis_name is not None:
        # Else each gradient of what the devices share would be summed over them by itself.
        params, state, step = _varying((params, state, step), axis_name)

    def chunk_sums(tasks, weights):
        return _chunk_sums(learner, params, tasks, weights, step, state)

    sums, info = _sum_over_chunks(chunk_sums, tasks, weights, num_tasks, size, axis_name)
    if axis_name is not None:
        sums = jax.lax.psum(sums, axis_name)
    means = jax.tree.map(lambda total: total / sums.weight, sums)
    cast = lambda mean, like: mean.astype(like.dtype)
    grads = jax.tree.map(cast, means.grads, params)
    loss, query_loss = (cast(mean, info.query_loss) for mean in (means.loss, means.query_loss))
    state = _join_state(means.state, info.state)
    return loss, query_loss, grads, info._replace(state=state)


class _Sums(NamedTuple):
    """Weighted sums over tasks, in float32 at least."""

    weight: Array
    loss: Array
    query_loss: Array
    grads: Any
    state: Any


def _chunk_sums(learner, params, tasks, weights, step, state):
    """One chunk's sums and its Info, whose state is what cannot be summed (of the first task)."""

    def weighted_loss(params):
        task_loss = lambda task: learner.loss(params, task, step=step, state=state)
        losses, info = _vmap(task_loss, weights.size)(tasks)
        return jnp.sum(weights * losses), info

    (loss, info), grads = jax.value_and_grad(weighted_loss, has_aux=True)(params)
    total = lambda x: jnp.tensordot(weights, x.astype(weights.dtype), axes=1)
    summed, rest = _split_state(info.state)
    sums = _Sums(
        jnp.sum(weights),
        loss,
        total(info.query_loss),
        _in_float32(grads),
        [total(x) for x in summed],
    )
    # A chunk without weight holds stand-ins, which on a device of its own may be anything.
    sums = jax.tree.map(lambda x: jnp.where(jnp.any(weights > 0), x, 0), sums)
    return sums, info._replace(state=jax.tree.map(lambda x: x[0], rest))


def _sum_over_chunks(chunk_sums, tasks, weights, num_tasks, size, axis_name):
    weights = jnp.ones(num_tasks) if weights is None else weights
    if size == num_tasks:
        return chunk_sums(tasks, weights)
    num_chunks = -(-num_tasks // size)
    if num_chunks * size > num_tasks:
        index = jnp.arange(num_chunks * size)
        tasks = _take(tasks, jnp.minimum(index, num_tasks - 1))
        weights = jnp.pad(weights, (0, num_chunks * size - num_tasks))
    split = lambda leaf: leaf.reshape(num_chunks, size, *leaf.shape[1:])
    chunks = jax.tree.map(split, (tasks, weights))

    def add(total, chunk):
        sums, info = chunk_sums(*chunk)
        return jax.tree.map(jnp.add, total, sums), info

    shapes, _ = jax.eval_shape(chunk_sums, *jax.tree.map(lambda leaf: leaf[0], chunks))
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    if axis_name is not None:
        zeros = _varying(zeros, axis_name)
    sums, infos = jax.lax.scan(add, zeros, chunks)
    rest = jax.tree.map(lambda leaf: leaf[-1], infos.state)
    join = lambda leaf: leaf.reshape(num_chunks * size, *leaf.shape[2:])[:num_tasks]
    return sums, jax.tree.map(join, infos._replace(state=()))._replace(state=rest)


def _vmap(function, size):
    """vmap that leaves out the axis where it has length one, which XLA would carry through."""
    if size > 1:
        return jax.vmap(function)

    def single(tasks):
        out = function(jax.tree.map(lambda leaf: leaf[0], tasks))
        return jax.tree.map(lambda leaf: leaf[None], out)

    return single


def _split_state(state):
    """The floating-point leaves, whose mean is carried, and the rest (counters, keys), whose is not."""
    leaves, treedef = jax.tree.flatten(state)
    is_float = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
    summed = [leaf for flag, leaf in zip(is_float, leaves, strict=True) if flag]
    rest = treedef.unflatten([None if f else x for f, x in zip(is_float, leaves, strict=True)])
    return summed, rest


def _join_state(means, rest):
    found = iter(means)
    fill = lambda leaf: next(found) if leaf is None else leaf
    return jax.tree.map(fill, rest, is_leaf=lambda leaf: leaf is None)


def _in_float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def _take(tasks: Task, index: Array) -> Task:
    return jax.tree.map(lambda leaf: leaf[index], tasks)


def _varying(tree: Any, axis_name: str) -> Any:
    """Marks what all devices of the mesh axis share as one copy each."""
    return jax.tree.map(lambda leaf: jax.lax.pcast(leaf, axis_name, to="varying"), tree)
