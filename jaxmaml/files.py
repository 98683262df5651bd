"""Files that are written whole or not at all, and the directory for caches."""

import contextlib
import hashlib
import os
import secrets
import threading
from collections.abc import Iterable, Iterator
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


def fingerprint(root: Path, paths: Iterable[Path]) -> str:
    """Returns a digest that changes when files below a directory change or change places.

    The files are not read. Size and modification time can be equal for different contents: the time
    of the last change of the inode tells a file that was written again, and the number of the inode
    tells two files that changed places, for example because their folders were renamed.

    Args:
        root: the directory.
        paths: the files, all below `root`.

    Raises:
        ReadError: a file is not there, or cannot be accessed.
    """
    try:
        return digest(str(root.resolve()), [_identity(root, path) for path in sorted(paths)])
    except OSError as error:
        raise ReadError(f"{error.filename} cannot be read: {error.strerror}") from error


def _identity(root: Path, path: Path) -> tuple[str, int, int, int, int]:
    stat = path.stat()
    name = path.relative_to(root).as_posix()
    return name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
