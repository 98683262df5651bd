"""Files that are written whole or not at all, locks, digests, and the directory for caches."""

import contextlib
import glob
import hashlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

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
def atomic_write(path: Path, *, replace: bool = True) -> Iterator[IO[bytes]]:
    """Opens a file that appears under its name, complete, when the block ends without an error.

    The file is written beside `path` and then renamed. Two processes may write the same path at
    the same time: the last one wins.

    Args:
        path: the file to write; missing parent directories are created.
        replace: whether an existing file is replaced.

    Raises:
        ValueError: `path` exists, and is not to be replaced.
        WriteError: the file cannot be written, for example because the disk is full. Nothing is
            left behind.
    """
    if not replace:
        check_absent(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not `tempfile`, whose files only their owner can read.
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not replace:
            check_absent(path)  # it may have been made in the meantime
        os.replace(temporary, path)
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):  # such as a parent that is not a directory
            temporary.unlink(missing_ok=True)  # does nothing after the rename


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields a directory that gets its name, complete, when the block ends without an error.

    Args:
        path: the directory to make; missing parent directories are created.

    Raises:
        ValueError: `path` exists.
        WriteError: a file cannot be written. Nothing is left behind.
    """
    check_absent(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        check_absent(path)  # it may have been made in the meantime
        os.replace(temporary, path)
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # does nothing after the rename


def remove_partial(path: Path, *, min_age: float = 0.0) -> None:
    """Removes what `atomic_write` left of a file when its process was killed.

    Args:
        path: the file.
        min_age: seconds since the last change of what is removed: another process may be writing.
    """
    for partial in path.parent.glob(f".{glob.escape(path.name)}.????????"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime >= min_age:
                partial.unlink()


def check_absent(path: Path) -> None:
    """Raises ValueError if a file exists."""
    if os.path.lexists(path):
        raise ValueError(f"{path} exists already: remove it or choose another name")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of a file, which is made before and removed after it.

    The kernel frees the lock of a process that dies. Its file, which then stays, locks nothing.

    Args:
        path: the file of the lock; missing parent directories are created.

    Raises:
        ValueError: another process, or another block of this one, holds the lock.
        WriteError: the file cannot be written or locked.
    """
    try:
        descriptor = _acquire(path)
    except BlockingIOError:
        raise ValueError(f"{path.parent} is in use by another process") from None
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error}") from error
    try:
        yield
    finally:
        # Removed while it is held: who opens it now sees that it is gone, see `_acquire`.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path, num_tries: int = 100) -> int:
    """Returns the descriptor of a locked file. Raises OSError if the lock is not free."""
    for _ in range(num_tries - 1):
        # Whoever held the lock may remove its file and the directory at any moment.
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            return _try_to_acquire(path)
    return _try_to_acquire(path)


def _try_to_acquire(path: Path) -> int:
    """Does what `_acquire` does, or raises FileNotFoundError if the file is removed meanwhile."""
    import fcntl  # not on Windows, where the library works without locks

    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            raise FileNotFoundError(f"{path} was removed while it was opened")
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def map_array(path: Path) -> np.ndarray:
    """Returns the array of a .npy file, mapped into memory, from any thread.

    NumPy parses the header with `ast.literal_eval`, which in CPython 3.11 can raise a SystemError if
    several threads are in it at once: one at a time they are safe.

    Raises:
        OSError, ValueError: the file is missing or damaged.
    """
    with _HEADER_LOCK:
        return np.load(path, mmap_mode="r")


def expanded(path: str | os.PathLike[str]) -> Path:
    """Returns a path with `~` or `~user` replaced by the home directory.

    Example:
        >>> expanded("~/data") == Path.home() / "data"
        True

    Raises:
        ValueError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{os.fspath(path)!r} has no home directory to begin with: {error}"
        ) from None


def digest(*parts: object) -> str:
    """Returns sixteen hexadecimal digits that change with any of the parts.

    Example:
        >>> digest("a", 1) == digest("a", 1), digest("a", 1) == digest("a", 2)
        (True, False)
    """
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def json_digest(value: Any) -> str:
    """Returns the SHA-256 of a value that JSON can hold; the order of keys does not count.

    Example:
        >>> json_digest({"a": 1, "b": (2,)}) == json_digest({"b": [2], "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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
