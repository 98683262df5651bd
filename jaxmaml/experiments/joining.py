"""The processes of one command: its start in each of them, and what only process 0 shows."""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxmaml import processes
from jaxmaml.experiments import devices, native_output
from jaxmaml.experiments.devices import Devices
from jaxmaml.experiments.options import DeviceOptions

_CONNECTION = re.compile("Gloo|NCCL|CoordinationService|UNAVAILABLE|DEADLINE_EXCEEDED|heartbeat")
"""Text of the errors of collective operations that fail because of another process."""


def join(used: DeviceOptions) -> None:
    """Joins the other processes of a command, if there are any; before anything runs in JAX.

    Raises:
        ValueError: options that do not fit, or no cluster that can be detected.
        ConnectionError: process 0 cannot be reached.
    """
    devices.number_of(used.devices)
    given = used.coordinator, used.num_processes, used.process_id
    if used.distributed:
        native_output.filter_output()
        processes.initialize(*given)
    elif any(value is not None for value in given):
        raise ValueError(
            "coordinator, num_processes and process_id can be used with --distributed only"
        )


def chosen_devices(used: DeviceOptions, num_tasks: int) -> Devices:
    """Returns the devices of a command, the same in all processes; an error is that of all."""
    with processes.agreeing():
        return devices.choose(
            num_tasks, devices=used.devices, mesh=used.mesh, fully_sharded=used.fully_sharded
        )


def agreed(out: Path) -> Path:
    """Returns the run directory of process 0: a default name has the time in it."""
    return Path(processes.first(str(out)))


@contextlib.contextmanager
def silent_but_first() -> Iterator[None]:
    """Shows on standard output what process 0 prints, and nothing of the others."""
    if processes.is_first():
        yield
        return
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def lost(error: Exception) -> str | None:
    """Returns what to tell the user if an error means that another process has ended; else None."""
    # JAX raises it as errors of several types.
    if jax.process_count() > 1 and _CONNECTION.search(str(error)):
        return f"{native_output.LOST} ({error})"
    return None
