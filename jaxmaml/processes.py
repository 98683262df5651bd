"""Several processes that train together: their start, and what they must agree on.

JAX runs one process per host, or per device. Each of them runs the same program on its own devices,
and waits in every collective operation for the others: they must make the same decisions. What one
of them knows alone, such as the time or a signal, is told to all by `gathered` or `first`.
"""

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxmaml.checks import check_count

TIMEOUT = 60
"""Seconds until a coordinator that cannot be reached is an error."""
HEARTBEAT_TIMEOUT = 30
"""Seconds without a sign of life after which a process counts as dead."""


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = TIMEOUT,
) -> None:
    """Joins the other processes of a training. Call it before anything else runs in JAX.

    Under SLURM, Open MPI and on TPU pods, `jax.distributed` finds out all three numbers. Elsewhere
    give them. It does what `jax.distributed.initialize` does, but an unreachable coordinator is an
    error, where JAX ends the process.

    Args:
        coordinator: "host:port" of process 0, which listens there.
        num_processes: the number of processes.
        process_id: the number of this process, 0 to num_processes - 1.
        timeout: seconds to wait for the other processes.

    Raises:
        ValueError: numbers that are missing or do not fit, or a coordinator without a port.
        ConnectionError: the coordinator cannot be reached, or not all processes came.

    Example:
        >>> initialize("localhost:1234", num_processes=2, process_id=2)
        Traceback (most recent call last):
        ValueError: process_id must be 0 to num_processes - 1 = 1; got 2
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(f"{' and '.join(missing)} must be given, too, or none of the three")
    if coordinator is not None and num_processes is not None and process_id is not None:
        _check_numbers(check_count("num_processes", num_processes), process_id)
        _check_reachable(coordinator, process_id, timeout)
    # Whoever calls `gathered` regularly learns of signals by it; JAX's own service would only report.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=timeout,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT, shutdown_timeout_seconds=timeout,
        )  # fmt: skip
    except ValueError as error:
        if missing:
            raise ValueError(
                "no cluster was detected (SLURM, Open MPI, a TPU pod): give coordinator, num_processes "
                f"and process_id ({error})"
            ) from None
        raise


def _check_numbers(num_processes: int, process_id: Any) -> None:
    check_count("process_id", process_id, minimum=0)
    if process_id >= num_processes:
        raise ValueError(
            f"process_id must be 0 to num_processes - 1 = {num_processes - 1}; got {process_id}"
        )


def _check_reachable(coordinator: str, process_id: int, timeout: int) -> None:
    """Raises an error where `jax.distributed.initialize` would end the process."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"coordinator must be host:port; got {coordinator!r}")
    if process_id == 0:
        _check_free(int(port))
        return
    end, reason = time.monotonic() + timeout, None
    while time.monotonic() < end:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            reason = error
            time.sleep(0.5)
    raise ConnectionError(
        f"the coordinator {coordinator} cannot be reached within {timeout} s ({reason}): process 0 must "
        "run there, and its port be open"
    )


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConnectionError(
                f"process 0 cannot listen on port {port} ({error}): another process 0 may run here"
            ) from None


def is_first() -> bool:
    """Returns whether this is process 0, the only one that writes files and prints.

    Example:
        >>> is_first()
        True
    """
    return jax.process_index() == 0


def gathered(value: Any) -> list[Any]:
    """Returns the values of all processes, in their order; every process must call it.

    Args:
        value: anything that JSON can hold.

    Example:
        >>> gathered({"step": 3})
        [{'step': 3}]
    """
    if jax.process_count() == 1:
        return [value]
    # JAX gathers arrays of one shape: first the sizes, then the texts filled up to the longest one.
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def first(value: Any) -> Any:
    """Returns the value of process 0; every process must call it.

    Args:
        value: anything that JSON can hold.

    Example:
        >>> first("a")
        'a'
    """
    return gathered(value)[0]


@contextlib.contextmanager
def agreeing() -> Iterator[None]:
    """An error that a user can mend, raised within the block by one process, is raised by all of them.

    Without it, the others would wait in the next collective operation for the one that has ended.

    Example:
        >>> with agreeing():
        ...     raise ValueError("no such file")
        Traceback (most recent call last):
        ValueError: no such file
    """
    error: Exception | None = None
    try:
        yield
    except (ValueError, TypeError, OSError) as raised:
        error = raised
    texts = gathered(None if error is None else str(error))
    if error is not None:
        raise error
    for process, text in enumerate(texts):
        if text is not None:
            raise ValueError(f"process {process}: {text}")


def from_first(make: Callable[[], Any]) -> Any:
    """Returns what process 0 makes, which the others do not; an error is raised by all of them.

    Args:
        make: returns anything that JSON can hold.

    Example:
        >>> from_first(lambda: 3)
        3
    """
    value = None
    with agreeing():
        if is_first():
            value = make()
    return first(value)
