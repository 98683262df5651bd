"""The task axis spread over devices: the cores of a CPU, GPUs or TPUs.

Tasks are independent until their gradients are summed: each device adapts its own share, and one
all-reduce of the gradient joins them. On a CPU this is how to use all cores, because the matrix
products of one task are too small to be split between them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmaml import batching, outer
from jaxmaml.batching import TASKS, ChunkSize
from jaxmaml.checks import check_count
from jaxmaml.types import Array, MetaLearner, MetaState, Task


def task_mesh(num_tasks: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh of the largest number of devices that share `num_tasks` evenly.

    Args:
        num_tasks: tasks per outer step.
        devices: the devices to choose from. Defaults to `jax.devices()`. A CPU has one, unless
            `jax.config.update("jax_num_cpu_devices", n)` is called before anything runs.

    Returns:
        A mesh with one axis "tasks", whose size divides `num_tasks`.

    Raises:
        ValueError: `num_tasks` is below 1.

    Example:
        >>> from jaxmaml import parallel
        >>> parallel.task_mesh(7, jax.devices()[:1]).shape["tasks"]
        1
    """
    check_count("num_tasks", num_tasks)
    devices = list(jax.devices() if devices is None else devices)
    size = max(n for n in range(1, len(devices) + 1) if num_tasks % n == 0)
    return Mesh(np.array(devices[:size]), (TASKS,), axis_types=(AxisType.Auto,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies a pytree to every device of a mesh.

    Args:
        tree: any pytree of arrays.
        mesh: see `task_mesh`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmaml import parallel
        >>> len(parallel.replicate(jnp.zeros(3), parallel.task_mesh(1)).devices())
        1
    """
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def spread(tasks: Any, mesh: Mesh) -> Any:
    """Puts an even share of the tasks on every device of a mesh.

    Args:
        tasks: leaves `[num_tasks, ...]`.
        mesh: see `task_mesh`.

    Raises:
        ValueError: the mesh does not divide the tasks evenly.

    Example:
        >>> import jax.numpy as jnp, jaxmaml
        >>> from jaxmaml import parallel
        >>> tasks = jaxmaml.Task(jnp.zeros((4, 5)), jnp.zeros((4, 15)))
        >>> parallel.spread(tasks, parallel.task_mesh(4)).support.shape
        (4, 5)
    """
    batching.check_divides(batching.check_tasks(tasks), mesh)
    return jax.device_put(tasks, NamedSharding(mesh, PartitionSpec(TASKS)))


def meta_step(
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    meta_state: MetaState,
    tasks: Task,
    *,
    mesh: Mesh,
    weights: Any = None,
    chunk_size: ChunkSize = "auto",
) -> tuple[MetaState, dict[str, Array]]:
    """Makes one outer step, `jaxmaml.meta_step`, with the tasks spread over a mesh.

    Args:
        mesh: see `task_mesh`; its size divides the number of tasks.
        learner, optimizer, meta_state, tasks, weights: see `jaxmaml.meta_step`.
        chunk_size: how many tasks each device computes at once.

    Returns:
        The next state and the metrics of `jaxmaml.meta_step`, the same on every device. On a CPU,
        wait for one step (`jax.block_until_ready`) before the next: concurrent programs can deadlock,
        since each waits for all devices while it holds threads that the others need.

    Raises:
        ValueError: the mesh does not divide the tasks evenly.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> from jaxmaml import parallel
        >>> learner = jaxmaml.maml(lambda p, batch: jnp.mean((p - batch) ** 2) / 2, optax.sgd(0.5), 1)
        >>> tasks, optimizer = jaxmaml.Task(jnp.ones((4, 3)), jnp.ones((4, 3))), optax.sgd(1.0)
        >>> meta_state = jaxmaml.init_state(learner, optimizer, jnp.array(0.0))
        >>> mesh = parallel.task_mesh(4)
        >>> meta_state, _ = parallel.meta_step(learner, optimizer, meta_state, tasks, mesh=mesh)
        >>> float(meta_state.params)
        0.25
    """
    batching.check_divides(batching.check_tasks(tasks), mesh)

    def on_a_device(
        meta_state: MetaState, tasks: Task, weights: Any
    ) -> tuple[MetaState, dict[str, Array]]:
        return outer.meta_step(
            learner, optimizer, meta_state, tasks,
            weights=weights, chunk_size=chunk_size, axis_name=TASKS,
        )  # fmt: skip

    shared, whole = PartitionSpec(TASKS), PartitionSpec()
    # JAX's check of what varies between devices refuses every loop or branch, of a loss or an
    # optimizer, that starts from a fresh constant. What is returned is the same on all devices:
    # `meta_grad` sums over them, and the optimizer computes on the sums.
    return jax.shard_map(
        on_a_device,
        mesh=mesh, in_specs=(whole, shared, shared), out_specs=(whole, whole), check_vma=False,
    )(meta_state, tasks, weights)  # fmt: skip
