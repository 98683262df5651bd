"""The settings of JAX and of this process before a command computes."""

import contextlib
import os
from collections.abc import Iterator

from jaxmaml.commands.mistakes import UserError

PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds"
"""The XLA flag for the seconds that a CPU device waits for the others, before XLA ends the process."""
FIRST_UNKNOWN = (0, 13)
"""The first version of JAX that may not have the flag: XLA ends the process at an unknown one."""


@contextlib.contextmanager
def session(matmul_precision: str, devices: str = "all") -> Iterator[None]:
    """Sets the devices, the compilation cache and the precision of matrix products."""
    import jax

    from jaxmaml.experiments import program_cache

    num_cpus = len(os.sched_getaffinity(0)) if devices == "all" else int(devices)
    # One device per core: the matrix products of one task are too small to be split over cores.
    # A program that calls `main` after it has run JAX keeps the devices that it has.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", num_cpus)

    program_cache.use()
    try:
        with _patient_collectives(jax.__version_info__):
            jax.devices()
    except Exception as error:  # JAX has an AssertionError without text among them
        platforms = os.environ.get("JAX_PLATFORMS")
        reason = str(error) or "there is no such backend"
        raise UserError(f"JAX cannot start with JAX_PLATFORMS={platforms!r}: {reason}") from None
    with jax.default_matmul_precision(matmul_precision):
        yield


@contextlib.contextmanager
def _patient_collectives(version: tuple[int, ...]) -> Iterator[None]:
    """Lets CPU devices wait an hour for each other; XLA reads its flags when JAX finds its devices.

    By default they wait for 40 seconds. On a busy machine, a long outer step takes one device more than
    another, and the training ended in the middle.
    """
    before = os.environ.get("XLA_FLAGS", "")
    if PATIENCE in before or version >= FIRST_UNKNOWN:
        yield
        return
    os.environ["XLA_FLAGS"] = f"{before} {PATIENCE}=3600".strip()
    try:
        yield
    finally:
        # JAX keeps compiled programs under a key that has the flags in it.
        if before:
            os.environ["XLA_FLAGS"] = before
        else:
            del os.environ["XLA_FLAGS"]
