"""Files that are written whole or not at all, and the directory for caches."""

import contextlib
import hashlib
import os
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

_HEADER_LOCK = threading.Lock()


class WriteError(ValueError):
    """A file cannot be written. The message names the file and the reason.

    Example:
        >>> issubclass(WriteError, ValueError)
        True
    """


class ReadError(ValueError):
    """A file cannot be read, or its contents are damaged. The message names the file.

    Example:
        >>> issubclass(ReadError, ValueError)
        True
    """


def cache_dir() -> Path:
    """Returns the user's cache directory for this package."""
    import platformdirs

    return platformdirs.user_cache_path("jaxmaml")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file that appears under its name, complete, when the block ends without an error.

    The file is written beside `path` and then renamed. Two processes may write the same path at
    the same time: the last one wins.

    Args:
        path: the file to write; missing parent directories are created.

    Raises:
        WriteError: the file cannot be written, for example because the disk is full. Nothing is
            left behind.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not `tempfile`, whose files only their owner can read.
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):  # such as a parent that is not a directory
            temporary.unlink(missing_ok=True)  # does nothing after the rename


def map_array(path: Path) -> np.ndarray:
    """Returns the array of a .npy file, mapped into memory, from any thread.

    NumPy parses the header with `ast.literal_eval`, which in CPython 3.11 can raise a SystemError if
    several threads are in it at once: one at a time they are safe.

    Raises:
        OSError, ValueError: the file is missing or damaged.
    """
    with _HEADER_LOCK:
        return np.load(path, mmap_mode="r")


def digest(*parts: object) -> str:
    """Returns sixteen hexadecimal digits that change with any of the parts.

    Example:
        >>> digest("a", 1) == digest("a", 1), digest("a", 1) == digest("a", 2)
        (True, False)
    """
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def fingerprint(paths: list[Path]) -> str:
    """Returns a digest of the names, sizes and modification times of some files."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths)]
    return digest(*stats)
