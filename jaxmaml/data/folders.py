"""The image files of the user: a folder with one folder of images per class."""

import itertools
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxmaml import files, stages

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
"""Files of a folder that are read as images."""


class FileRecords:
    """Image files, in the order in which they are given.

    Args:
        paths: the files.

    Example:
        >>> len(FileRecords([Path("a.png"), Path("b.png")]))
        2
    """

    def __init__(self, paths: Sequence[Path]):
        self._files = list(paths)

    def __len__(self) -> int:
        return len(self._files)

    def encoded(self, numbers: Sequence[int]) -> list[bytes]:
        """Returns the bytes of the files with these numbers.

        Raises:
            ValueError: a file cannot be read.
        """
        return [self._read(int(number)) for number in numbers]

    def where(self, number: int) -> str:
        """Returns the path of a file, for messages."""
        return str(self._files[number])

    def _read(self, number: int) -> bytes:
        try:
            return self._files[number].read_bytes()
        except OSError as error:
            raise files.ReadError(f"{self.where(number)} cannot be read: {error}") from error


class FolderRecords(FileRecords):
    """The image files in a folder that has one sub-folder per class, in the order of their names.

    Files and folders whose names start with a dot are ignored. Other files are images if their
    suffix is one of `IMAGE_SUFFIXES` and they are directly in the folder of a class. What is not
    read is listed in `skipped`, with a warning.

    Args:
        path: the folder.
        every_class: whether a folder without images is refused, not skipped.

    Attributes:
        skipped: paths relative to the folder, in order: files in the folders of the classes that
            are not read, images outside them, and folders without images, which are not classes.

    Raises:
        ValueError: the folder does not exist, cannot be read, or has no sub-folders with images; or
            one of them has none, with `every_class`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     for name in ("cat", "dog"):
        ...         Path(directory, name).mkdir()
        ...         _ = Path(directory, name, "0.png").write_bytes(b"")
        ...     records = FolderRecords(Path(directory))
        >>> records.class_names, records.labels().tolist()
        (('cat', 'dog'), [0, 1])
    """

    def __init__(self, path: Path, *, every_class: bool = False):
        if not path.is_dir():
            raise ValueError(f"folder {path} does not exist")
        with stages.stage(f"scanning folder {path.name}") as advance:
            found, skipped = _scan(path, advance)
        if not found:
            raise ValueError(
                f"folder {path} must hold one folder of images ({' '.join(IMAGE_SUFFIXES)}) per "
                f"class; it holds none{_not_read(skipped)}"
            )
        if every_class:
            _check_every_class(path, {file.parent.name for file in found})
        if skipped:
            warnings.warn(f"folder {path}{_not_read(skipped)}", stacklevel=2)
        self.skipped = skipped
        self.name = path.name
        self.num_channels = 3
        self.class_names = tuple(sorted({file.parent.name for file in found}))
        self.fingerprint = files.fingerprint(path, found)
        super().__init__(found)

    def labels(self) -> np.ndarray:
        """Returns int32 `[len(self)]`, each an index into `class_names`."""
        label_of = {name: label for label, name in enumerate(self.class_names)}
        return np.array([label_of[file.parent.name] for file in self._files], np.int32)


def is_image(file: Path) -> bool:
    """Returns whether a file of a folder is read as an image, by its name.

    Example:
        >>> is_image(Path("cat/0.PNG")), is_image(Path("cat/._0.png")), is_image(Path("cat/a.txt"))
        (True, False, False)
    """
    return file.suffix.lower() in IMAGE_SUFFIXES and not _is_hidden(file.name)


def images_in(path: Path) -> list[Path]:
    """Returns the images directly in a folder, in the order of their names, or a single file.

    A warning lists other files and folders, but those whose names start with a dot.

    Raises:
        ValueError: the path does not exist or cannot be read, or has no images.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     _ = Path(directory, "b.png").write_bytes(b"")
        ...     [file.name for file in images_in(Path(directory))]
        ['b.png']
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path} does not exist")
    try:
        entries = sorted(entry for entry in path.iterdir() if not _is_hidden(entry.name))
    except OSError as error:
        raise files.ReadError(f"folder {path} cannot be read: {error.strerror}") from error
    found, others = [], []
    for entry in entries:
        (found if _is_read(entry) else others).append(entry)
    where = "only pictures directly in it are"
    names = [entry.name for entry in others]
    listed = f"{len(others)} not read, {where}: {_listed(names)}" if others else ""
    if not found:
        raise ValueError(
            f"folder {path} must hold images ({' '.join(IMAGE_SUFFIXES)}); it holds none"
            + (f", and {listed}" if listed else "")
        )
    if others:
        warnings.warn(f"folder {path}: {listed}", stacklevel=2)
    return found


def _check_every_class(path: Path, found: Collection[str]) -> None:
    """Raises ValueError if a folder of a class has no images."""
    for entry in sorted(path.iterdir()):
        if entry.is_dir() and not _is_hidden(entry.name) and entry.name not in found:
            raise ValueError(
                f"folder {entry} of a class holds no images ({' '.join(IMAGE_SUFFIXES)}): add some, "
                "or remove it"
            )


def _scan(path: Path, advance: Callable[[int], None]) -> tuple[list[Path], tuple[str, ...]]:
    """Returns the images in the folders of the classes, and the relative paths of what is skipped.

    Args:
        path: the folder.
        advance: receives the number of files that were found in each folder of a class.
    """
    found: list[Path] = []
    skipped: list[Path] = []
    try:
        for entry in path.iterdir():
            if entry.is_dir() and not _is_hidden(entry.name):
                listed = list(_files_below(entry))
                advance(len(listed))
                is_in = [file.parent == entry and _is_read(file) for file in listed]
                found += itertools.compress(listed, is_in)
                skipped += [file for file, read in zip(listed, is_in, strict=True) if not read]
                skipped += [] if listed else [entry]
            elif is_image(entry):
                skipped.append(entry)
    except OSError as error:
        raise files.ReadError(
            f"folder {error.filename} cannot be read: {error.strerror}"
        ) from error
    return sorted(found), tuple(file.relative_to(path).as_posix() for file in sorted(skipped))


def _files_below(folder: Path) -> Iterator[Path]:
    """Yields the files at any depth whose names, and whose folders' names, are not hidden."""

    def refuse(error: OSError) -> None:
        raise error

    for directory, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        yield from (Path(directory, name) for name in names if not _is_hidden(name))


def _is_read(file: Path) -> bool:
    return is_image(file) and file.is_file()


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _not_read(skipped: Sequence[str]) -> str:
    if not skipped:
        return ""
    where = "only pictures directly in the folder of a class are"
    return f": {len(skipped)} not read, {where}: {_listed(skipped)}"


def _listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
