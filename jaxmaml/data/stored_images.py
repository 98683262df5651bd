"""Images of one split: on disk or in memory, read by row, with rows sorted by class."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmaml.data.decoders import Decoder, Format, Reader
from jaxmaml.data.image_cache import cached
from jaxmaml.data.records import Records


@dataclasses.dataclass(frozen=True)
class Images:
    """The images of one split. Each split has its own, so classes cannot leak.

    Attributes:
        starts: int32 `[num_classes]`, the first row of each class.
        sizes: int32 `[num_classes]`, the number of images of each class; they may differ.
        names: the name of each class, in the same order.
        numbers: int64 `[num_images]`, the record number of each row.
        reader: reads images by record number.

    Example:
        >>> images = from_arrays(np.zeros((3, 8, 8, 1), np.uint8), [1, 0, 1], ["a", "b"])
        >>> images.shape, images.sizes.tolist()
        ((8, 8, 1), [1, 2])
    """

    starts: np.ndarray
    sizes: np.ndarray
    names: tuple[str, ...]
    numbers: np.ndarray
    reader: Reader

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image."""
        return self.reader.shape

    def read(self, rows: Any) -> np.ndarray:
        """Returns uint8 `[*rows.shape, H, W, C]` for an array of rows."""
        rows = np.asarray(rows)
        images = self.reader.read(self.numbers[rows.reshape(-1)])
        return images.reshape(*rows.shape, *self.shape)

    def labels(self) -> np.ndarray:
        """Returns int32 `[num_images]`, the class of each row."""
        return np.repeat(np.arange(len(self.names), dtype=np.int32), self.sizes)


@dataclasses.dataclass(frozen=True)
class InMemory:
    """A `Reader` of images that are in memory.

    Attributes:
        images: uint8 `[num_images, H, W, C]`.

    Example:
        >>> InMemory(np.zeros((9, 8, 8, 1), np.uint8)).read(np.array([3, 1])).shape
        (2, 8, 8, 1)
    """

    images: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """Returns uint8 `[len(numbers), H, W, C]`."""
        return self.images[numbers]


def from_arrays(images: Any, labels: Any, names: Sequence[str]) -> Images:
    """Returns images in memory, sorted by class; within a class they keep their order.

    Args:
        images: uint8 `[num_images, H, W, C]`.
        labels: integers `[num_images]`, each an index into `names`.
        names: distinct class names.

    Raises:
        TypeError: the images are not uint8, or the labels are not integers.
        ValueError: the shapes do not fit, names repeat, a label has no name, or a class no image.

    Example:
        >>> from_arrays(np.zeros((3, 8, 8, 1), np.uint8), [1, 0, 1], ["a", "b"]).numbers.tolist()
        [1, 0, 2]
    """
    images, labels, names = np.asarray(images), np.asarray(labels), tuple(names)
    _check_arrays(images, labels, names)
    sizes = np.bincount(labels, minlength=len(names)).astype(np.int32)
    if not sizes.all():
        raise ValueError(f"labels: class {names[sizes.argmin()]!r} has no images")
    starts = np.cumsum(sizes, dtype=np.int32) - sizes
    return Images(starts, sizes, names, np.argsort(labels, kind="stable"), InMemory(images))


def open_images(
    records: Records, class_split: Mapping[str, Sequence[str]], format: Format, *, cache: bool
) -> dict[str, Images]:
    """Returns the images of each split.

    Args:
        records: the encoded images.
        class_split: the class names of each split.
        format: the form that images are decoded to.
        cache: whether all records are decoded once, into a file in the user's cache directory that
            has H * W * C bytes per image. Where it cannot be written, they are decoded each time.

    Raises:
        ValueError: a split names a class that does not exist, has no images, or is in another split
            too; or the records cannot be read.

    Example:
        >>> from jaxmaml import files
        >>> from jaxmaml.data import class_splits, datasets
        >>> from jaxmaml.data.records import TFDSRecords
        >>> _ = datasets.images("glyphs")  # prepares the dataset, if it is not there
        >>> records = TFDSRecords("glyphs", files.cache_dir() / "tfds")
        >>> digits = {"train": ["DIGIT ONE", "DIGIT TWO"], "test": ["DIGIT THREE"]}
        >>> open_images(records, digits, Format(28, "L"), cache=False)["train"].sizes.tolist()
        [20, 20]
    """
    _check_class_split(records, class_split)
    labels = records.labels()
    reader: Reader = Decoder(records, format)
    if cache:
        reader = cached(records, reader, format)
    return {split: _subset(records, labels, names, reader) for split, names in class_split.items()}


def _check_arrays(images: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> None:
    if images.dtype != np.uint8:
        raise TypeError(f"images must be uint8; got {images.dtype}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels must be integers; got {labels.dtype}")
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        raise ValueError(
            "images must be [num_images, H, W, C] and labels [num_images]; "
            f"got {images.shape} and {labels.shape}"
        )
    if len(set(names)) != len(names):
        raise ValueError("names must be distinct")
    if labels.size == 0 or labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(f"labels must be in 0..{len(names) - 1}, one for each of the names")


def _check_class_split(records: Records, class_split: Mapping[str, Sequence[str]]) -> None:
    split_of: dict[str, str] = {}
    known = set(records.class_names)
    for split, names in class_split.items():
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(
                f"split {split!r} names classes that {records.name} does not have: "
                f"{_first(unknown)}; it has {len(known)}: {_first(records.class_names)}"
            )
        for name in names:
            if name in split_of:
                raise ValueError(
                    f"class {name!r} is in split {split_of[name]!r} and in split {split!r}"
                )
            split_of[name] = split


def _subset(records: Records, labels: np.ndarray, names: Sequence[str], reader: Reader) -> Images:
    # The record numbers of each class.
    order = np.argsort(labels, kind="stable")
    ends = np.cumsum(np.bincount(labels, minlength=len(records.class_names)))
    by_class = dict(zip(records.class_names, np.split(order, ends[:-1]), strict=True))

    # Those of the classes of this split, one class after the other.
    numbers = [by_class[name] for name in names]
    sizes = np.array([len(of_class) for of_class in numbers], np.int32)
    if not sizes.all():
        raise ValueError(f"class {names[int(sizes.argmin())]!r} of {records.name} has no images")
    starts = np.cumsum(sizes, dtype=np.int32) - sizes
    return Images(starts, sizes, tuple(names), np.concatenate(numbers), reader)


def _first(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(map(repr, names[:most])) + (", ..." if len(names) > most else "")
