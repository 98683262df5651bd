"""Tasks in batches: sums over chunks of tasks, and over the devices that they are spread over."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun, primitives

from jaxmaml import rewriting, trees
from jaxmaml.checks import check_count, is_weight
from jaxmaml.collectives import Axis
from jaxmaml.types import Array, Info, MetaLearner, MetaParams, Scalar, State, Task

TASKS = "tasks"
"""The name of the mesh axis over which tasks are spread."""

ChunkSize: TypeAlias = int | Literal["auto"] | None
"""The number of tasks computed at once: an integer, "auto" to decide by the device, or None for all."""


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


def chunk_size_of(
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
        if isinstance(chunk_size, str):
            raise ValueError(
                f"chunk_size must be an integer, 1 or more, None or 'auto'; got {chunk_size!r}"
            )
        return min(check_count("chunk_size", chunk_size), num_tasks)
    if jax.default_backend() == "cpu":
        return 1
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", np.inf)
    fitting = limit / 2 / task_bytes(learner, meta_params, tasks, state)
    return int(min(num_tasks, max(1, fitting)))


def check_weights(weights: Any, num_tasks: int) -> Array:
    """Returns the weights of tasks, in float32 at least.

    Raises:
        ValueError: weights of another length, or known ones that are negative, not finite or all zero.
    """
    weights = jnp.asarray(weights)
    if weights.shape != (num_tasks,):
        raise ValueError(f"weights must be [num_tasks] = [{num_tasks}]; got {list(weights.shape)}")
    # In NumPy: under jit, JAX would trace the check even if the caller's weights are known.
    known = None if isinstance(weights, Tracer) else np.asarray(weights)
    if known is not None and not (is_weight(known).all() and known.max() > 0):
        raise ValueError("weights must be finite, not negative and not all zero")
    return weights.astype(jnp.promote_types(weights.dtype, jnp.float32))


def with_stand_ins(tasks: Task, weights: Array) -> Task:
    """Returns tasks in which one that counts stands in for each that has no weight.

    Example:
        >>> tasks = Task(jnp.array([1.0, jnp.nan, 3.0]), jnp.array([4.0, jnp.nan, 6.0]))
        >>> with_stand_ins(tasks, jnp.array([1.0, 0.0, 2.0])).query.tolist()
        [4.0, 4.0, 6.0]
    """
    return _take(tasks, jnp.where(weights > 0, jnp.arange(weights.size), jnp.argmax(weights > 0)))


class Means(NamedTuple):
    """Means over tasks, in the types of the meta-parameters and the losses."""

    loss: Array
    query_loss: Array
    grads: MetaParams


class Sums(NamedTuple):
    """Weighted sums over tasks, in float32 at least. `state` has the floating-point leaves only."""

    weight: Array
    loss: Array
    query_loss: Array
    grads: MetaParams
    state: State


def mean_over_tasks(
    learner: MetaLearner,
    params: MetaParams,
    tasks: Task,
    step: Scalar,
    state: State,
    weights: Any,
    chunk_size: ChunkSize,
    axis: Axis | None = None,
) -> tuple[Means, Info]:
    """Sums over chunks and devices, then one division.

    Under an axis, each device has some of the tasks and all parameters; of a gradient it gets the part
    that it has of the parameter.
    """
    # A task of weight zero is replaced by one that counts: whatever it holds is never computed on.
    num_tasks = check_tasks(tasks)
    trees.check_params(params)
    size = chunk_size_of(chunk_size, learner, params, tasks, state)
    if weights is None:
        weights = jnp.ones(num_tasks)
    else:
        weights = check_weights(weights, num_tasks)
        tasks = with_stand_ins(tasks, weights)

    # What the devices share is marked as one copy each: otherwise JAX would sum each gradient of it
    # over the devices by itself.
    if axis is not None:
        params, state, step = axis.varying((params, state, step))
    chunk_sums = functools.partial(_chunk_sums, learner, params, step, state)
    sums, info = _sum_over_chunks(chunk_sums, tasks, weights, size, axis)
    # Traced weights that are wrong make every mean NaN, whatever the chunks.
    total = jnp.where(jnp.all(is_weight(weights)), sums.weight, jnp.nan)
    sums = sums._replace(weight=total)
    if axis is not None:
        info = info._replace(state=axis.of_first_device(info.state, jnp.any(weights > 0)))
        sums = _over_devices(sums, axis)

    # Means in the types that the caller knows.
    means = jax.tree.map(lambda total: total / sums.weight, sums)
    cast = lambda mean, like: mean.astype(jnp.result_type(like))
    grads = jax.tree.map(cast, means.grads, params)
    loss, query_loss = (cast(mean, info.query_loss) for mean in (means.loss, means.query_loss))
    carried = trees.combine(_in_types_of(state, means.state), info.state)
    return Means(loss, query_loss, grads), info._replace(state=carried)


def _chunk_sums(
    learner: MetaLearner,
    params: MetaParams,
    step: Scalar,
    state: State,
    tasks: Task,
    weights: Array,
) -> tuple[Sums, Info]:
    """The sums of one chunk, and its Info, whose state has the leaves that cannot be summed."""

    def weighted_loss(params: MetaParams) -> tuple[Array, Info]:
        task_loss = lambda task: learner.loss(params, task, step=step, state=state)
        losses, info = _vmap(task_loss, weights.size)(tasks)
        return jnp.sum(weights * losses), info

    (loss, info), grads = jax.value_and_grad(weighted_loss, has_aux=True)(params)

    # Counters and keys of the state are those of the first task; the rest is summed.
    floats, others = trees.partition(info.state, trees.is_float(info.state))
    first_of_others = jax.tree.map(lambda leaf: leaf[0], others)

    def total(leaf: Array) -> Array:
        # Never in fewer digits than the leaf has, on an accelerator either.
        leaf = leaf.astype(jnp.result_type(leaf, weights))
        return jnp.tensordot(weights.astype(leaf.dtype), leaf, axes=1, precision="highest")

    sums = Sums(
        weight=jnp.sum(weights),
        loss=loss,
        query_loss=total(info.query_loss),
        grads=trees.in_float32(grads),
        state=jax.tree.map(total, floats),
    )

    # A chunk without weight has stand-ins, which on a device of its own may hold anything.
    sums = jax.tree.map(lambda leaf: jnp.where(jnp.any(weights > 0), leaf, 0), sums)
    return sums, info._replace(state=first_of_others)


def _sum_over_chunks(
    chunk_sums: Callable[[Task, Array], tuple[Sums, Info]],
    tasks: Task,
    weights: Array,
    size: int,
    axis: Axis | None,
) -> tuple[Sums, Info]:
    """The sums over all tasks, `size` of them at a time."""
    num_tasks, watched = weights.size, watch_convolutions(chunk_sums, size)
    if size == num_tasks:
        return watched(tasks, weights)

    # Chunks of equal size; the last one is filled up with tasks of weight zero.
    num_chunks = -(-num_tasks // size)
    if num_chunks * size > num_tasks:
        index = jnp.arange(num_chunks * size)
        tasks = _take(tasks, jnp.minimum(index, num_tasks - 1))
        weights = jnp.pad(weights, (0, num_chunks * size - num_tasks))
    split = lambda leaf: leaf.reshape(num_chunks, size, *leaf.shape[1:])
    chunks = jax.tree.map(split, (tasks, weights))

    # A scan that adds them up.
    def add(total: Sums, chunk: tuple[Task, Array]) -> tuple[Sums, Info]:
        sums, info = chunk_sums(*chunk)
        return jax.tree.map(jnp.add, total, sums), info

    shapes, _ = jax.eval_shape(watched, *jax.tree.map(lambda leaf: leaf[0], chunks))
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    if axis is not None:
        zeros = axis.varying(zeros)
    sums, infos = jax.lax.scan(add, zeros, chunks)

    # What is reported per task, in the order of the tasks.
    state = jax.tree.map(lambda leaf: leaf[0], infos.state)
    join = lambda leaf: leaf.reshape(num_chunks * size, *leaf.shape[2:])[:num_tasks]
    return sums, jax.tree.map(join, infos._replace(state=()))._replace(state=state)


def _over_devices(sums: Sums, axis: Axis) -> Sums:
    """The sums over all devices."""
    rest, grads = axis.total_with_grads(sums._replace(grads=()), sums.grads)
    return rest._replace(grads=grads)


def _vmap(function: Callable[[Task], Any], size: int) -> Callable[[Task], Any]:
    """`jax.vmap` without an axis of length one, which XLA would carry through every operation."""
    if size > 1:
        return jax.vmap(function)

    def single(tasks: Task) -> Any:
        out = function(jax.tree.map(lambda leaf: leaf[0], tasks))
        return jax.tree.map(lambda leaf: leaf[None], out)

    return single


def watch_convolutions(function: Callable[..., Any], size: int) -> Callable[..., Any]:
    """Returns a function that warns if it adapts convolutions in a form that is slow on a CPU.

    Under `vmap` a convolution with a kernel per task becomes a grouped one, which XLA computes 35 to 95
    times slower on a CPU than products do. One task at a time, the gradient of a kernel is still
    computed several times slower. The function is traced once, as before.

    Args:
        function: a function of pytrees of arrays that computes some tasks.
        size: the number of tasks that it computes at once.

    Example:
        >>> import jax.numpy as jnp
        >>> watch_convolutions(jax.vmap(jnp.sin), 2)(jnp.zeros(2)).tolist()
        [0.0, 0.0]
    """
    if jax.default_backend() != "cpu":
        return function

    def watched(*args: Any) -> Any:
        jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        if _adapts_convolutions(jaxpr, size):
            warnings.warn(
                "the model's convolutions have kernels of each task, and their derivatives are 10 to 95 "
                "times slower than necessary on a CPU: wrap the model in "
                "jaxmaml.nn.fast_convolutions(apply_fn)",
                stacklevel=2,
            )
        outputs = jaxpr_as_fun(jaxpr)(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return watched


def _adapts_convolutions(jaxpr: ClosedJaxpr, size: int) -> bool:
    """Whether there is a convolution with kernels of `size` tasks, or the gradient of a kernel."""
    found = [
        eqn.params
        for eqn, _ in rewriting.operations(jaxpr.jaxpr)
        if eqn.primitive is primitives.conv_general_dilated_p
    ]
    num_groups = [params["feature_group_count"] * params["batch_group_count"] for params in found]
    if size > 1 and any(number > 1 and number % size == 0 for number in num_groups):
        return True
    # The gradient of a kernel contracts the examples, in place of the channels.
    layouts = {params["dimension_numbers"].lhs_spec for params in found}
    return any((layout[1], layout[0], *layout[2:]) in layouts for layout in layouts)


def _in_types_of(state: State, means: State) -> State:
    """The mean of the floating-point state, in the types of the state that was carried in."""
    floats = trees.partition(state, trees.is_float(state))[0]
    if jax.tree.structure(floats) != jax.tree.structure(means):
        raise ValueError(
            "the loss function returned a state of another structure than the one it was given: "
            "pass the model's initial state to init_state or meta_grad, and return a state like it"
        )
    return jax.tree.map(lambda mean, like: mean.astype(jnp.result_type(like)), means, floats)


def _take(tasks: Task, index: Array) -> Task:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], tasks)
