"""The compiled programs that a command keeps for the next one, in JAX's persistent compilation cache.

A second start of the same command compiles nothing. The programs are in the user's cache directory, or
where JAX_COMPILATION_CACHE_DIR says. JAX_ENABLE_COMPILATION_CACHE=false turns the cache off.
"""

import contextlib
import os
from pathlib import Path

import jax

from jaxmaml import files

MAX_BYTES = 2**30
"""The size to which the directory is cut back. A command keeps one or two megabytes."""

_EVERY_PROGRAM = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
"""By default, JAX leaves out what compiles in less than a second: most programs of a command."""


def use() -> None:
    """Makes this process keep every program that it compiles, and look for it there first.

    Settings that are in the environment, or that the calling program made, stay as they are.
    """
    for name, value in _EVERY_PROGRAM.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    if jax.config.values["jax_compilation_cache_dir"] is None:  # an empty one is a choice, too
        directory = files.cache_dir() / "compilation"
        remove_oldest(directory, MAX_BYTES)
        jax.config.update("jax_compilation_cache_dir", str(directory))


def remove_oldest(directory: Path, max_bytes: int) -> None:
    """Removes the files that were not used for the longest time, until the others fit.

    JAX can do so itself (jax_compilation_cache_max_size), but only with the package filelock, and only
    where every entry was written under that limit. The programs of earlier versions of JAX and of this
    package are never read again.

    Args:
        directory: a directory that may be missing.
        max_bytes: the size that its files may have together.
    """
    stats = []
    with contextlib.suppress(OSError):  # another process may remove files at the same time
        stats = [(path, path.stat()) for path in directory.rglob("*") if path.is_file()]

    # The time of access, which many file systems write once a day, and that of writing.
    used = lambda item: max(item[1].st_atime, item[1].st_mtime)
    num_bytes = sum(stat.st_size for _, stat in stats)
    for path, stat in sorted(stats, key=used):
        if num_bytes <= max_bytes:
            return
        with contextlib.suppress(OSError):
            path.unlink()
        num_bytes -= stat.st_size
