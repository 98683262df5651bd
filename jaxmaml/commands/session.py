"""The settings of JAX and of this process before a command computes."""

import contextlib
import os
from collections.abc import Iterator

from jaxmaml.commands.mistakes import UserError


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
        jax.devices()
    except Exception as error:  # JAX has an AssertionError without text among them
        platforms = os.environ.get("JAX_PLATFORMS")
        reason = str(error) or "there is no such backend"
        raise UserError(f"JAX cannot start with JAX_PLATFORMS={platforms!r}: {reason}") from None
    with jax.default_matmul_precision(matmul_precision):
        yield
