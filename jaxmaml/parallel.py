"""Meshes of devices, and what is put where on them: the cores of a CPU, GPUs or TPUs.

Tasks are independent until their gradients are summed: each device adapts its own share, and one
all-reduce of the gradient joins them. On a CPU this is how to use all cores, because the matrix
products of one task are too small to be split between them. The devices may belong to several
processes: all functions here do the same with one process and with many.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmaml import processes
from jaxmaml.batching import TASKS, check_tasks
from jaxmaml.checks import check_count
from jaxmaml.types import Array, Task

MODEL = "model"
"""The name of the mesh axis over which single arrays may be split."""


WHOLE = PartitionSpec()
"""The spec of an array that every device has as a whole."""


class Shares(NamedTuple):
    """The division of the tasks of a step between devices.

    Attributes:
        num_tasks: the tasks of all processes.
        per_device: the number of tasks that each device computes.
        is_even: whether no device has less.

    Example:
        >>> Shares(num_tasks=3, per_device=2, is_even=False).per_device
        2
    """

    num_tasks: int
    per_device: int
    is_even: bool


def make_mesh(
    tasks: int | None = None, model: int = 1, *, devices: Sequence[Any] | None = None
) -> Mesh:
    """Returns a mesh of devices with the axis "tasks", and the axis "model" if it is longer than one.

    Args:
        tasks: the number of devices over which tasks are spread. Defaults to all of them, divided by
            `model`. It need not divide the number of tasks.
        model: the number of devices over which arrays may be split, see `place`.
        devices: the devices to choose from. Defaults to `jax.devices()`, those of all processes. A CPU
            has one, unless `jax.config.update("jax_num_cpu_devices", n)` is called before anything
            runs.

    Raises:
        ValueError: there are not enough devices, or a process would have none of them.

    Example:
        >>> from jaxmaml import parallel
        >>> dict(parallel.make_mesh(devices=jax.devices()[:1]).shape)
        {'tasks': 1}
    """
    devices = list(jax.devices() if devices is None else devices)
    check_count("model", model)
    tasks = max(1, len(devices) // model) if tasks is None else check_count("tasks", tasks)
    if tasks * model > len(devices):
        raise ValueError(
            f"a mesh of tasks={tasks} and model={model} needs {tasks * model} devices; there are "
            f"{len(devices)}"
        )
    used = devices[: tasks * model]
    idle = {d.process_index for d in devices} - {d.process_index for d in used}
    if idle:
        raise ValueError(
            f"a mesh of tasks={tasks} and model={model} uses {len(used)} of {len(devices)} devices, and "
            f"none of process {min(idle)}: every process must take part"
        )
    shape = {TASKS: tasks} if model == 1 else {TASKS: tasks, MODEL: model}
    types = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=types, devices=used)


def check_mesh(mesh: Mesh) -> None:
    """Raises ValueError unless a mesh is of the kind that `make_mesh` returns.

    Example:
        >>> check_mesh(make_mesh(1))
    """
    how = "make it with jaxmaml.parallel.make_mesh"
    if TASKS not in mesh.axis_names:
        raise ValueError(f"the mesh has no axis {TASKS!r}, but {', '.join(mesh.axis_names)}: {how}")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(f"the mesh must have the axis types Auto; got {mesh.axis_types}: {how}")


def place(tree: Any, mesh: Mesh, specs: Any = WHOLE) -> Any:
    """Puts a pytree on the devices of a mesh.

    Args:
        tree: any pytree of arrays; the same in every process.
        mesh: see `make_mesh`.
        specs: a `PartitionSpec`, or a pytree of them that is a prefix of `tree`. Defaults to a copy on
            every device. See `split_specs`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmaml import parallel
        >>> len(parallel.place(jnp.zeros(3), parallel.make_mesh(2)).devices())
        2
    """
    put = lambda spec, part: jax.tree.map(lambda leaf: _put(leaf, NamedSharding(mesh, spec)), part)
    return jax.tree.map(put, specs, tree, is_leaf=_is_spec)


def split_specs(tree: Any, mesh: Mesh, axes: Sequence[str] = (TASKS,)) -> Any:
    """Returns for each leaf how it is split over axes of a mesh, so that no device holds all of it.

    Each axis in turn splits the longest dimension that it divides and that is not split yet. A leaf
    that has none, such as a bias of a few numbers, is copied to all devices.

    Split over "tasks", parameters and optimizer state take a share of the memory on each device, and
    are gathered for the computation (ZeRO; Rajbhandari et al. 2020, arXiv 1910.02054). Split over
    "model", they stay split, and XLA divides the computation.

    Args:
        tree: parameters, or a whole `MetaState`; shapes are enough.
        mesh: see `make_mesh`.
        axes: names of axes of the mesh.

    Returns:
        `PartitionSpec`s like `tree`, for `place`.

    Raises:
        ValueError: an axis that the mesh does not have.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmaml import parallel
        >>> mesh = parallel.make_mesh(2)
        >>> specs = parallel.split_specs({"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(3)}, mesh)
        >>> specs == {"kernel": PartitionSpec(None, "tasks"), "bias": PartitionSpec()}
        True
    """
    unknown = sorted(set(axes) - set(mesh.axis_names))
    if unknown:
        raise ValueError(f"the mesh has the axes {', '.join(mesh.axis_names)}; got {unknown[0]!r}")
    return jax.tree.map(lambda leaf: _split_spec(jnp.shape(leaf), mesh, axes), tree)


def specs_of(tree: Any, mesh: Mesh) -> Any:
    """Returns how each leaf of a pytree is split over a mesh; a copy for one that is not on it.

    Args:
        tree: any pytree of arrays.
        mesh: see `make_mesh`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmaml import parallel
        >>> mesh = parallel.make_mesh(2)
        >>> placed = parallel.place(jnp.zeros(4), mesh, PartitionSpec("tasks"))
        >>> parallel.specs_of(placed, mesh) == PartitionSpec("tasks")
        True
    """

    def spec(leaf: Any) -> PartitionSpec:
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh == mesh:
            return sharding.spec
        return WHOLE

    return jax.tree.map(spec, tree)


def share_of(mesh: Mesh) -> tuple[int, int]:
    """Returns (index, count): which of `count` equal shares of the tasks this process brings.

    Processes whose devices are at the same places of the axis "tasks" bring the same share.

    Args:
        mesh: see `make_mesh`.

    Example:
        >>> from jaxmaml import parallel
        >>> parallel.share_of(parallel.make_mesh(2))
        (0, 1)
    """
    groups = sorted(set(_places_by_process(mesh).values()))
    return groups.index(local_places(mesh)), len(groups)


def local_places(mesh: Mesh) -> tuple[int, ...]:
    """Returns the places of the axis "tasks" at which this process has a device.

    Args:
        mesh: see `make_mesh`.

    Example:
        >>> from jaxmaml import parallel
        >>> parallel.local_places(parallel.make_mesh(2))
        (0, 1)
    """
    return _places_by_process(mesh)[jax.process_index()]


def agree_on_shares(num_tasks: int, mesh: Mesh) -> Shares:
    """Returns how tasks are shared. Every process must call it, with the number of its own tasks.

    Args:
        num_tasks: the tasks that this process brings, see `share_of`; 0 is allowed if others have some.
        mesh: see `make_mesh`.

    Example:
        >>> from jaxmaml import parallel
        >>> parallel.agree_on_shares(3, parallel.make_mesh(2))
        Shares(num_tasks=3, per_device=2, is_even=False)
    """
    found = processes.gathered([share_of(mesh)[0], num_tasks, len(local_places(mesh))])
    by_share = {index: (number, num_places) for index, number, num_places in found}
    per_device = max(-(-number // num_places) for number, num_places in by_share.values())
    total = sum(number for number, _ in by_share.values())
    if not total:
        raise ValueError("no process has a task")
    return Shares(total, per_device, total == per_device * mesh.shape[TASKS])


def spread(tasks: Task, mesh: Mesh, shares: Shares | None = None) -> tuple[Task, Array | None]:
    """Puts a share of the tasks on every device of a mesh.

    Where the devices do not divide the tasks evenly, they are filled up with tasks of weight zero.

    Args:
        tasks: leaves `[num_tasks, ...]`: all tasks, or with several processes those of this one, see
            `share_of`.
        mesh: see `make_mesh`.
        shares: see `agree_on_shares`, which is called otherwise.

    Returns:
        (tasks, weights) for `jaxmaml.meta_step`. The weights are None if all tasks count.

    Example:
        >>> import jax.numpy as jnp, jaxmaml
        >>> from jaxmaml import parallel
        >>> tasks = jaxmaml.Task(jnp.zeros((3, 5)), jnp.zeros((3, 15)))
        >>> tasks, weights = parallel.spread(tasks, parallel.make_mesh(2))
        >>> tasks.support.shape, weights.tolist()
        ((4, 5), [1.0, 1.0, 1.0, 0.0])
    """
    num_tasks = jax.tree.leaves(tasks)[0].shape[0]
    shares = shares or agree_on_shares(check_tasks(tasks), mesh)
    num_places = len(local_places(mesh)) * shares.per_device
    sharding = NamedSharding(mesh, PartitionSpec(TASKS))

    def put(local: Any) -> Array:
        if _is_key(local):
            data = put(jax.random.key_data(local))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(local))
        shape = (mesh.shape[TASKS] * shares.per_device, *local.shape[1:])
        return jax.make_array_from_process_local_data(sharding, local, shape)

    filled = jax.tree.map(lambda leaf: _filled_up(leaf, num_places), tasks)
    weights = None if shares.is_even else put(np.float32(np.arange(num_places) < num_tasks))
    return jax.tree.map(put, filled), weights


def evened(tasks: Task, weights: Any, mesh: Mesh) -> tuple[Task, Any]:
    """Returns tasks and weights such that a mesh divides them evenly; those added have no weight.

    It can be traced. Without weights, and if the mesh divides the tasks, they stay None.

    Example:
        >>> import jax.numpy as jnp, jaxmaml
        >>> tasks = jaxmaml.Task(jnp.zeros((3, 5)), jnp.zeros((3, 15)))
        >>> tasks, weights = evened(tasks, None, make_mesh(2))
        >>> tasks.query.shape, weights.tolist()
        ((4, 15), [1.0, 1.0, 1.0, 0.0])
    """
    check_mesh(mesh)
    num_tasks, size = check_tasks(tasks), mesh.shape[TASKS]
    length = -(-num_tasks // size) * size
    if length == num_tasks:
        return tasks, weights
    weights = jnp.ones(num_tasks) if weights is None else weights
    weights = jnp.pad(weights, (0, length - num_tasks))
    return jax.tree.map(lambda leaf: _filled_up(jnp.asarray(leaf), length), tasks), weights


def along_tasks(specs: Any) -> Any:
    """Returns `PartitionSpec`s without the axes other than "tasks", for `shard_map` over it.

    Example:
        >>> along_tasks(PartitionSpec("model", "tasks")) == PartitionSpec(None, "tasks")
        True
    """
    kept = lambda spec: PartitionSpec(*(name if name == TASKS else None for name in spec))
    return jax.tree.map(kept, specs, is_leaf=_is_spec)


def to_host(tree: Any) -> Any:
    """Returns a pytree of arrays, on whatever devices, as NumPy arrays in every process.

    PRNG keys, which NumPy does not have, stay keys of JAX.

    Args:
        tree: any pytree of arrays. Every process must call it if one of them is split.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmaml import parallel
        >>> parallel.to_host(parallel.place(jnp.ones(2), parallel.make_mesh(2))).tolist()
        [1.0, 1.0]
    """

    def fetch(leaf: Any) -> Any:
        if _is_key(leaf):
            data = fetch(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)


def _filled_up(leaf: Any, length: int) -> Any:
    """Returns an array whose first axis has a length, filled up with its last row, or with zeros."""
    missing = length - leaf.shape[0]
    if not missing:
        return leaf
    if not leaf.shape[0]:
        return np.zeros((length, *leaf.shape[1:]), leaf.dtype)
    return jnp.concatenate([leaf, jnp.repeat(leaf[-1:], missing, axis=0)])


def _is_spec(value: Any) -> bool:
    return isinstance(value, PartitionSpec)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _put(leaf: Any, sharding: NamedSharding) -> Array:
    """Puts an array, which every process has as a whole, on devices of all processes."""
    if _is_key(leaf):
        data = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    if isinstance(leaf, jax.Array):
        if leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            return leaf
        if not leaf.is_fully_addressable:
            return jax.jit(lambda leaf: leaf, out_shardings=sharding)(leaf)
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def _split_spec(shape: tuple[int, ...], mesh: Mesh, axes: Sequence[str]) -> PartitionSpec:
    names: list[str | None] = [None] * len(shape)
    for axis in axes:
        free = [i for i, name in enumerate(names) if name is None and shape[i]]
        fitting = [i for i in free if shape[i] % mesh.shape[axis] == 0]
        if fitting:
            names[max(fitting, key=lambda i: shape[i])] = axis
    while names and names[-1] is None:
        names.pop()
    return PartitionSpec(*names)


def _places_by_process(mesh: Mesh) -> dict[int, tuple[int, ...]]:
    """Returns the places of the axis "tasks" at which each process has a device."""
    check_mesh(mesh)
    axis = mesh.axis_names.index(TASKS)
    rows: dict[int, set[int]] = {}
    for place, device in np.ndenumerate(mesh.devices):
        rows.setdefault(device.process_index, set()).add(place[axis])
    return {process: tuple(sorted(found)) for process, found in rows.items()}
