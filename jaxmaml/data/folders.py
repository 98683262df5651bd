"""The image files of the user: a folder with one folder of images per class."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxmaml import files, stages

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
"""Files of a folder that are read as images."""


class FolderRecords:
    """The image files in a folder that has one sub-folder per class, in the order of their names.

    Files and folders whose names start with a dot are ignored. Other files are images if their
    suffix is one of `IMAGE_SUFFIXES` and they are directly in the folder of a class. What is not
    read is listed in `skipped`, with a warning.

    Args:
        path: the folder.

    Attributes:
        skipped: paths relative to the folder, in order: files in the folders of the classes that
            are not read, images outside them, and folders without images, which are not classes.

    Raises:
        ValueError: the folder does not exist, cannot be read, or has no sub-folders with images.

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

    def __init__(self, path: Path):
        if not path.is_dir():
            raise ValueError(f"folder {path} does not exist")
        with stages.stage(f"scanning folder {path.name}") as advance:
            found, skipped = _scan(path, advance)
        if not found:
            raise ValueError(
                f"folder {path} must hold one folder of images ({' '.join(IMAGE_SUFFIXES)}) per "
                f"class; it holds none{_not_read(skipped)}"
            )
        if skipped:
            warnings.warn(f"folder {path}{_not_read(skipped)}", stacklevel=2)
        self.skipped = skipped
        self.name = path.name
        self.num_channels = 3
        self.class_names = tuple(sorted({file.parent.name for file in found}))
        self.fingerprint = files.fingerprint(path, found)
        self._files = found

    def __len__(self) -> int:
        return len(self._files)

    def labels(self) -> np.ndarray:
        """Returns int32 `[len(self)]`, each an index into `class_names`."""
        label_of = {name: label for label, name in enumerate(self.class_names)}
        return np.array([label_of[file.parent.name] for file in self._files], np.int32)

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


def is_image(file: Path) -> bool:
    """Returns whether a file of a folder is read as an image, by its name.

    Example:
        >>> is_image(Path("cat/0.PNG")), is_image(Path("cat/._0.png")), is_image(Path("cat/a.txt"))
        (True, False, False)
    """
    return file.suffix.lower() in IMAGE_SUFFIXES and not _is_hidden(file.name)


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
                images = [file for file in listed if file.parent == entry and _is_read(file)]
                found += images
                skipped += [file for file in listed if file not in set(images)]
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


def _not_read(skipped: Sequence[str], most: int = 5) -> str:
    if not skipped:
        return ""
    listed = ", ".join(skipped[:most]) + (", ..." if len(skipped) > most else "")
    return f": {len(skipped)} not read, as no images directly in the folder of a class: {listed}"
