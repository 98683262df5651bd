"""The task axis spread over devices: cores of a CPU, GPUs or TPUs.

Tasks are independent until their gradients are summed, so that each device adapts its own share and
one all-reduce of the gradient joins them. On a CPU this is the way to use all cores: the matrix
products of one task are too small to be split between them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmaml import outer
from jaxmaml.types import Array, MetaLearner, MetaState, Task

TASKS = "tasks"
"""The name of the mesh axis over which tasks are spread."""


def task_mesh(num_tasks: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of as many devices as share `num_tasks` evenly.

    Args:
        num_tasks: tasks per outer step.
        devices: those to choose from; None is all of `jax.devices()`. On a CPU there is one unless
            `jax.config.update("jax_num_cpu_devices", n)` is called before anything runs.

    Returns:
        A mesh with the one axis "tasks", whose size divides `num_tasks`.

    Example:
        >>> from jaxmaml import parallel
        >>> parallel.task_mesh(7, jax.devices()[:1]).shape["tasks"]
        1
    """
    devices = list(jax.devices() if devices is None else devices)
    size = max(n for n in range(1, len(devices) + 1) if num_tasks % n == 0)
    return Mesh(np.array(devices[:size]), (TASKS,), axis_types=(AxisType.Auto,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of `tree` on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def spread(tasks: Any, mesh: Mesh) -> Any:
    """Tasks, leaves `[num_tasks, ...]`, with an even share of them on every device of the mesh."""
    _check_divides(outer.check_tasks(tasks), mesh)
    return jax.device_put(tasks, NamedSharding(mesh, PartitionSpec(TASKS)))


def meta_step(
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    meta_state: MetaState,
    tasks: Task,
    *,
    mesh: Mesh,
    weights: Any = None,
    chunk_size: int | str | None = "auto",
) -> tuple[MetaState, dict[str, Array]]:
    """`jaxmaml.meta_step` with the tasks spread over the axis "tasks" of `mesh`.

    Args:
        mesh: see `task_mesh`; its size divides the number of tasks.
        learner, optimizer, meta_state, tasks, weights: see `jaxmaml.meta_step`.
        chunk_size: how many tasks each device computes at once.

    Returns:
        As `jaxmaml.meta_step`, the same on every device. On a CPU, wait for one step
        (`jax.block_until_ready`) before the next is called: programs in flight at once, each waiting
        for all devices, can take the threads from one another for good.

    Raises:
        ValueError: the tasks cannot be shared evenly.
    """
    _check_divides(outer.check_tasks(tasks), mesh)

    def on_a_device(meta_state, tasks, weights):
        return outer.meta_step(
            learner, optimizer, meta_state, tasks,
            weights=weights, chunk_size=chunk_size, axis_name=TASKS,
        )  # fmt: skip

    shared, whole = PartitionSpec(TASKS), PartitionSpec()
    return jax.shard_map(
        on_a_device, mesh=mesh, in_specs=(whole, shared, shared), out_specs=(whole, whole)
    )(meta_state, tasks, weights)


def evaluate(
    learner: MetaLearner,
    metric_fn: Any,
    meta_params: Any,
    tasks: Task,
    *,
    mesh: Mesh,
    **options: Any,
) -> Any:
    """`jaxmaml.evaluate` with the tasks spread over the axis "tasks" of `mesh`.

    Args:
        mesh: see `task_mesh`; its size divides the number of tasks.
        learner, metric_fn, meta_params, tasks, options: see `jaxmaml.evaluate`.

    Raises:
        ValueError: the tasks cannot be shared evenly.
    """
    _check_divides(outer.check_tasks(tasks), mesh)

    def on_a_device(meta_params, tasks):
        return outer.evaluate(learner, metric_fn, meta_params, tasks, **options)

    shared, whole = PartitionSpec(TASKS), PartitionSpec()
    # Nothing is summed over devices here, so that there is nothing for the check to look at.
    return jax.shard_map(
        on_a_device, mesh=mesh, in_specs=(whole, shared), out_specs=shared, check_vma=False
    )(meta_params, tasks)


def _check_divides(num_tasks: int, mesh: Mesh) -> None:
    size = mesh.shape[TASKS]
    if num_tasks % size:
        raise ValueError(
            f"the number of tasks must be a multiple of the mesh's {size} devices; got {num_tasks}"
        )
