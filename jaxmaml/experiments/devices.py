"""The devices that the options of a command choose, and how a training is spread over them."""

from collections import Counter
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxmaml import parallel
from jaxmaml.batching import TASKS
from jaxmaml.parallel import MODEL


class Devices(NamedTuple):
    """The devices that compute the outer steps.

    Attributes:
        mesh: the devices over which the tasks of an outer step are spread.
        axes: the axes of the mesh over which parameters and optimizer state are split.

    >>> Devices(parallel.make_mesh(1)).axes
    ()
    """

    mesh: Mesh
    axes: tuple[str, ...] = ()

    def place(self, tree: Any) -> Any:
        """Returns a pytree on the devices, copied to all of them or split."""
        specs = parallel.split_specs(tree, self.mesh, self.axes)
        return parallel.place(tree, self.mesh, specs)


def choose(
    num_tasks: int,
    *,
    devices: str = "all",
    mesh: str | None = None,
    fully_sharded: bool = False,
) -> Devices:
    """Returns the devices that options name.

    Args:
        num_tasks: the tasks of an outer step; one process uses no more devices than that by itself.
        devices: "all", or the number of devices of each process.
        mesh: the sizes of its axes, such as "tasks=4,model=2"; defaults to all devices for tasks.
        fully_sharded: whether parameters and optimizer state are split over the axis "tasks".

    Raises:
        ValueError: options that do not fit the devices there are.

    >>> choose(1).mesh.shape[TASKS]
    1
    """
    found = _devices(devices)
    if mesh is None:
        usable = found if jax.process_count() > 1 else found[:num_tasks]
        built = parallel.make_mesh(devices=usable)
    else:
        built = parallel.make_mesh(**_sizes(mesh), devices=found)
    axes = (TASKS,) * fully_sharded + (MODEL,) * (MODEL in built.axis_names)
    return Devices(built, axes)


def number_of(devices: str) -> int | None:
    """Returns the number of devices that an option names; None for "all".

    Raises:
        ValueError: it is neither.

    >>> number_of("all"), number_of("2")
    (None, 2)
    """
    if devices == "all":
        return None
    if not devices.isdecimal() or int(devices) < 1:
        raise ValueError(f"devices must be all or a number, 1 or more; got {devices!r}")
    return int(devices)


def _devices(devices: str) -> list[Any]:
    number, everything = number_of(devices), jax.devices()
    if number is None:
        return everything
    per_process = min(Counter(device.process_index for device in everything).values())
    if number > per_process:
        raise ValueError(f"devices must be all or at most {per_process}; got {number}")
    seen: Counter[int] = Counter()
    chosen = []
    for device in everything:
        if seen[device.process_index] < number:
            chosen.append(device)
        seen[device.process_index] += 1
    return chosen


def _sizes(mesh: str) -> dict[str, int]:
    """Returns the sizes of the axes of a mesh that is written as "tasks=4,model=2"."""
    sizes: dict[str, int] = {}
    for part in mesh.split(","):
        name, _, size = part.strip().partition("=")
        if name not in (TASKS, MODEL):
            raise ValueError(
                f"mesh has the axes {TASKS} and {MODEL}, as in tasks=4,model=2; got {mesh!r}"
            )
        if name in sizes or not size.isdecimal() or not int(size):
            raise ValueError(
                f"mesh must give each axis one size, as in tasks=4,model=2; got {mesh!r}"
            )
        sizes[name] = int(size)
    return sizes
