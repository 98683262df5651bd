"""Images that stay on disk, by row, rows sorted by class: decoded when asked for, or once for all."""

import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from jaxmaml import files
from jaxmaml.data.records import Records

IMAGES_PER_CHUNK = 1000
"""Decoded at a time, which bounds the memory of reading a whole data set."""


@dataclasses.dataclass(frozen=True)
class Format:
    """What encoded images become.

    Attributes:
        size: pixels a side.
        mode: "L" for one channel, "RGB" for three.
        resample: "nearest", which keeps a binary image binary, or "bilinear".
        ink: the image is binary, with ink 0, and becomes 255 where there is ink.
    """

    size: int
    mode: Literal["L", "RGB"] = "RGB"
    resample: Literal["nearest", "bilinear"] = "bilinear"
    ink: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.size, self.size, 1 if self.mode == "L" else 3


class Reader(Protocol):
    """Decoded images by record number; `shape` is (height, width, channels)."""

    @property
    def shape(self) -> tuple[int, int, int]: ...

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """uint8 `[len(numbers), H, W, C]`; safe in threads, and in a process it was pickled to."""
        ...


@dataclasses.dataclass(frozen=True)
class Images:
    """The images of one split of classes; a split is its own, so classes cannot leak.

    Attributes:
        starts: int32 `[num_classes]`, the first row of each class.
        sizes: int32 `[num_classes]`, the number of images of each class; they may differ.
        names: the name of each class, in the same order.
        numbers: int64 `[num_images]`, the record of each row.
        reader: decodes records.
    """

    starts: np.ndarray
    sizes: np.ndarray
    names: tuple[str, ...]
    numbers: np.ndarray
    reader: Reader

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.reader.shape

    def read(self, rows: Any) -> np.ndarray:
        """uint8 `[*rows.shape, H, W, C]` of an array of rows."""
        rows = np.asarray(rows)
        found = self.reader.read(self.numbers[rows.reshape(-1)])
        return found.reshape(*rows.shape, *self.shape)

    def labels(self) -> np.ndarray:
        """int32 `[num_images]`, the class of each row."""
        return np.repeat(np.arange(len(self.names), dtype=np.int32), self.sizes)


@dataclasses.dataclass(frozen=True)
class InMemory:
    """Images that are decoded already: uint8 `[num_images, H, W, C]`."""

    images: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def read(self, numbers: np.ndarray) -> np.ndarray:
        return self.images[numbers]


class Decoder:
    """Decodes records when they are asked for."""

    def __init__(self, records: Records, format: Format):
        self.records, self.format, self.shape = records, format, format.shape

    def read(self, numbers: np.ndarray) -> np.ndarray:
        images = np.empty((len(numbers), *self.shape), np.uint8)
        for first in range(0, len(numbers), IMAGES_PER_CHUNK):
            some = numbers[first : first + IMAGES_PER_CHUNK].tolist()
            for place, data in enumerate(self.records.encoded(some), start=first):
                images[place] = self._decode(data, numbers[place])
        return images

    def _decode(self, data: bytes, number: int) -> np.ndarray:
        # By Pillow, as TFDS would expand grey images to three channels.
        from PIL import Image

        try:
            with Image.open(io.BytesIO(data)) as image:
                decoded = _resized(image, self.format)
        except Exception as error:  # Pillow raises all kinds of damaged files
            where = self.records.where(int(number))
            raise ValueError(f"{where}: image cannot be decoded: {error}") from error
        return np.where(decoded > 0, 0, 255).astype(np.uint8) if self.format.ink else decoded


class Cache:
    """Decoded images in one file that is mapped into memory: pages come and go as they are used."""

    def __init__(self, path: Path, num_images: int, shape: tuple[int, int, int]):
        self.path, self.num_images, self.shape = path, num_images, shape

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_images"}

    def read(self, numbers: np.ndarray) -> np.ndarray:
        return self._images[numbers]

    def is_whole(self) -> bool:
        """Whether the file is there, of the right type, shape and size."""
        try:
            images = np.load(self.path, mmap_mode="r")
        except (OSError, ValueError, EOFError):
            return False
        return images.shape == (self.num_images, *self.shape) and images.dtype == np.uint8

    def build(self, reader: Reader) -> None:
        """Decodes all images, some at a time; the file appears when it is complete."""
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.num_images, *self.shape)}
        with files.atomic_write(self.path) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for first in range(0, self.num_images, IMAGES_PER_CHUNK):
                last = min(first + IMAGES_PER_CHUNK, self.num_images)
                file.write(reader.read(np.arange(first, last)).tobytes())

    @functools.cached_property
    def _images(self) -> np.ndarray:
        return np.load(self.path, mmap_mode="r")


def open_images(
    records: Records, splits: Mapping[str, Sequence[str]], format: Format, *, cache: bool
) -> dict[str, Images]:
    """The images of each split of classes.

    Args:
        records: where they lie.
        splits: the names of the classes of each split.
        format: what they become.
        cache: whether all records are decoded once into a file in the user's cache directory, of
            H * W * C bytes an image.

    Raises:
        ValueError: a split names a class that there is not, or that has no images, or another
            split's; records that cannot be read; a cache that cannot be written.
    """
    _check_splits(records, splits)
    labels = records.labels()
    reader: Reader = Decoder(records, format)
    if cache:
        reader = cached(records, reader, format)
    return {part: _subset(records, labels, names, reader) for part, names in splits.items()}


def from_arrays(images: Any, labels: Any, names: Sequence[str]) -> Images:
    """Images in memory in the form of images on disk.

    Args:
        images: uint8 `[num_images, H, W, C]`.
        labels: integers `[num_images]`, each an index into `names`.
        names: distinct class names.

    Raises:
        TypeError: if the images are not uint8 or the labels no integers.
        ValueError: if shapes do not fit, names repeat, a label has no name or a class no image.

    >>> from_arrays(np.zeros((3, 8, 8, 1), np.uint8), [1, 0, 1], ["a", "b"]).numbers.tolist()
    [1, 0, 2]
    """
    images, labels, names = np.asarray(images), np.asarray(labels), tuple(names)
    check_arrays(images, labels, names)
    sizes = np.bincount(labels, minlength=len(names)).astype(np.int32)
    if not sizes.all():
        raise ValueError(f"labels: class {names[sizes.argmin()]!r} has no images")
    starts = np.cumsum(sizes, dtype=np.int32) - sizes
    return Images(starts, sizes, names, np.argsort(labels, kind="stable"), InMemory(images))


def cached(records: Records, decoder: Reader, format: Format) -> Cache:
    """The cache of these records in this format, built where it is not whole."""
    key = files.digest(records.fingerprint, format, tuple(getattr(records, "splits", ())))
    path = files.cache_dir() / "images" / f"{records.name.replace('/', '-')}-{key}.npy"
    cache = Cache(path, len(records), format.shape)
    if not cache.is_whole():
        cache.build(decoder)
    return cache


def check_arrays(images: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> None:
    """Raises TypeError or ValueError unless these are images, their labels and the classes' names."""
    if images.dtype != np.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        raise ValueError(
            "images must be [num_images, H, W, C] and labels [num_images], "
            f"got {images.shape} and {labels.shape}"
        )
    if len(set(names)) != len(names):
        raise ValueError("names must be distinct")
    if labels.size == 0 or labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(f"labels must lie in 0..{len(names) - 1}, one for each of the names")


def _check_splits(records: Records, splits: Mapping[str, Sequence[str]]) -> None:
    seen: dict[str, str] = {}
    known = set(records.class_names)
    for part, names in splits.items():
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(
                f"split {part!r} names classes that {records.name} does not have: "
                f"{_some(unknown)}; it has {len(known)}: {_some(records.class_names)}"
            )
        for name in names:
            if name in seen:
                raise ValueError(f"class {name!r} is both in split {seen[name]!r} and in {part!r}")
            seen[name] = part


def _subset(records: Records, labels: np.ndarray, names: Sequence[str], reader: Reader) -> Images:
    order = np.argsort(labels, kind="stable")
    ends = np.cumsum(np.bincount(labels, minlength=len(records.class_names)))
    by_class = dict(zip(records.class_names, np.split(order, ends[:-1]), strict=True))
    of_class = [by_class[name] for name in names]
    sizes = np.array([len(found) for found in of_class], np.int32)
    if not sizes.all():
        raise ValueError(f"class {names[int(sizes.argmin())]!r} of {records.name} has no images")
    starts = np.cumsum(sizes, dtype=np.int32) - sizes
    return Images(starts, sizes, tuple(names), np.concatenate(of_class), reader)


def _resized(image: Any, format: Format) -> np.ndarray:
    from PIL import Image

    if format.resample == "nearest":
        resized = image.resize((format.size,) * 2, Image.Resampling.NEAREST)
        decoded = np.asarray(resized.convert(format.mode))
    else:
        converted = image.convert(format.mode)
        if converted.size != (format.size,) * 2:
            converted = converted.resize((format.size,) * 2, Image.Resampling.BILINEAR)
        decoded = np.asarray(converted)
    return decoded[..., None] if format.mode == "L" else decoded


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(map(repr, names[:most])) + (", ..." if len(names) > most else "")
