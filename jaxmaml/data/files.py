"""Files that exist whole or not at all: written aside, then renamed; and where caches lie."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def cache_dir() -> Path:
    """The user's cache directory for this package."""
    import platformdirs

    return platformdirs.user_cache_path("jaxmaml")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write; it appears under its name when the block ends, and never in part.

    Two processes may write the same file at once: each writes its own, and the last one stays.

    Raises:
        ValueError: the file cannot be written (no space, no permission); nothing is left behind.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
            temporary = file.name
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)  # gone where it was renamed


def digest(*parts: object) -> str:
    """Sixteen hexadecimal digits that differ where a part does."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def fingerprint(paths: list[Path]) -> str:
    """Of the names, sizes and times of files: it changes when one of them is written anew."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths)]
    return digest(*stats)
