"""Records: encoded images of a prepared TFDS dataset. `folders` has those of the files in a folder.

Both kinds number their images 0, 1, 2, ..., know their labels, and return the bytes of any image.
They are pickled to worker processes, which open the files again and run no JAX.
"""

import bisect
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxmaml import files, stages
from jaxmaml.data import label_cache

_RECORDS_PER_READ = 1000


class Encoded(Protocol):
    """Encoded images, by number.

    Example:
        >>> from jaxmaml.data.folders import FileRecords
        >>> images: Encoded = FileRecords([Path("a.png")])
        >>> images.where(0)
        'a.png'
    """

    def __len__(self) -> int: ...

    def encoded(self, numbers: Sequence[int]) -> list[bytes]:
        """Returns the encoded images of the records with these numbers."""
        ...

    def where(self, number: int) -> str:
        """Returns the file of a record, and its number in the file, for messages."""
        ...


class Records(Encoded, Protocol):
    """Encoded images with labels.

    Attributes:
        name: the name in messages.
        class_names: the names of all classes.
        num_channels: the channels of an image, or 3 if that is not known.
        fingerprint: a digest that changes when the files change, or which of them are read.

    Example:
        >>> import tempfile
        >>> from jaxmaml.data.folders import FolderRecords
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     Path(directory, "cat").mkdir()
        ...     _ = Path(directory, "cat", "0.png").write_bytes(b"")
        ...     records: Records = FolderRecords(Path(directory))
        >>> records.class_names
        ('cat',)
    """

    name: str
    class_names: tuple[str, ...]
    num_channels: int
    fingerprint: str

    def labels(self) -> np.ndarray:
        """Returns int32 `[len(self)]`, each an index into `class_names`."""
        ...


class TFDSRecords:
    """The records of a prepared TFDS dataset, numbered through its TFDS splits.

    Args:
        dataset: its name in TFDS, or `name/config`.
        data_dir: a TFDS data directory that holds it as ArrayRecord. It is only read.
        tfds_splits: the TFDS splits that are read, in this order. Defaults to all of them, in the
            order of their names.

    Raises:
        ValueError: the dataset is not there, is in another format, or has no image or no integer
            label.

    Example:
        >>> from jaxmaml.data import datasets
        >>> _ = datasets.images("glyphs")  # prepares the dataset, if it is not there
        >>> records = TFDSRecords("glyphs", files.cache_dir() / "tfds", ("validation",))
        >>> len(records), records.num_channels
        (1660, 1)
    """

    def __init__(self, dataset: str, data_dir: Path, tfds_splits: Sequence[str] | None = None):
        # What the dataset holds.
        self.name = dataset
        self.directory = _newest_version(dataset, data_dir)
        builder = _builder(self.directory)
        self.tfds_splits = tuple(tfds_splits or sorted(builder.info.splits))
        self.class_names = _class_names(dataset, builder.info.features)
        self.num_channels = builder.info.features["image"].shape[-1] or 3

        # The files, and the number of records in each.
        infos = [builder.info.splits[tfds_split] for tfds_split in self.tfds_splits]
        self._lengths = [info.num_examples for info in infos]
        self._shards = [
            (Path(self.directory, file).name, length)
            for info in infos
            for file, length in zip(info.filenames, info.shard_lengths, strict=True)
        ]
        paths = [self.directory / file for file, _ in self._shards]
        self.fingerprint = files.digest(
            self.tfds_splits,
            files.fingerprint(self.directory, [self.directory / "dataset_info.json", *paths]),
        )

    def __len__(self) -> int:
        return sum(self._lengths)

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay in this process: another process opens its own.
        return {key: value for key, value in self.__dict__.items() if key != "_data_sources"}

    @property
    def label_path(self) -> Path:
        """The file that keeps the labels in the user's cache directory."""
        return label_cache.label_path(self.name, self.directory, self.tfds_splits, self.fingerprint)

    def labels(self) -> np.ndarray:
        """Returns int32 `[len(self)]`: one pass that decodes no image, then from the cache.

        Raises:
            ValueError: a record cannot be read, or its label is not one of the classes.
        """
        num_classes = len(self.class_names)
        return label_cache.cached_labels(self.label_path, len(self), num_classes, self._read_labels)

    def encoded(self, numbers: Sequence[int]) -> list[bytes]:
        """Returns the encoded images of the records with these numbers.

        Raises:
            ValueError: a record cannot be read.
        """
        return [row["image"] for row in self._rows(numbers)]

    def where(self, number: int) -> str:
        """Returns the file of a record, and its number in the file, for messages."""
        starts = np.cumsum([0, *(length for _, length in self._shards)]).tolist()
        shard = bisect.bisect_right(starts, number) - 1
        return f"{self.directory / self._shards[shard][0]} record {number - starts[shard]}"

    @functools.cached_property
    def _data_sources(self) -> list[Any]:
        import tensorflow_datasets as tfds

        builder = _builder(self.directory)
        make_decoder: Any = tfds.decode.SkipDecoding
        decoders = {"image": make_decoder()}
        try:
            return [builder.as_data_source(name, decoders=decoders) for name in self.tfds_splits]
        except Exception as error:  # the reader raises errors of many types for damaged files
            raise files.ReadError(f"{self.directory} cannot be read: {error}") from error

    def _read_labels(self) -> np.ndarray:
        read: list[int] = []
        with stages.stage(f"reading the labels of {self.name}", len(self)) as advance:
            for first in range(0, len(self), _RECORDS_PER_READ):
                numbers = range(first, min(first + _RECORDS_PER_READ, len(self)))
                read += [row["label"] for row in self._rows(numbers)]
                advance(len(numbers))
        labels = np.array(read, np.int32)

        num_classes = len(self.class_names)
        wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
        if wrong.size:
            raise ValueError(
                f"{self.where(int(wrong[0]))}: label {labels[wrong[0]]} is not one of the "
                f"{num_classes} classes of {self.name}"
            )
        return labels

    def _rows(self, numbers: Sequence[int]) -> list[Any]:
        data_sources = self._data_sources  # an error here names the directory
        try:
            return self._fetch(data_sources, numbers)
        except Exception:  # the reader raises errors of many types for damaged files
            # One record at a time, which finds the damaged one.
            return [self._row(data_sources, number) for number in numbers]

    def _row(self, data_sources: list[Any], number: int) -> Any:
        try:
            return self._fetch(data_sources, [number])[0]
        except Exception as error:  # the reader raises errors of many types for damaged files
            raise files.ReadError(f"{self.where(number)} cannot be read: {error}") from error

    def _fetch(self, data_sources: list[Any], numbers: Sequence[int]) -> list[Any]:
        """Returns rows in the order of `numbers`, with one call per TFDS split."""
        # The places in the result that each TFDS split fills.
        ends = np.cumsum(self._lengths).tolist()
        places: dict[int, list[int]] = {}
        for place, number in enumerate(numbers):
            places.setdefault(bisect.bisect_right(ends, number), []).append(place)

        rows: list[Any] = [None] * len(numbers)
        for index, at in places.items():
            first = ends[index] - self._lengths[index]
            found = data_sources[index].__getitems__([int(numbers[i]) - first for i in at])
            for i, row in zip(at, found, strict=True):
                rows[i] = row
        return rows


def prepared_versions(dataset: str, data_dir: Path) -> list[Path]:
    """Returns the directories of a dataset's versions in a TFDS data directory, the newest last.

    Args:
        dataset: its name in TFDS, or `name/config`.
        data_dir: the TFDS data directory.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     for version in ("2.0.0", "10.0.0"):
        ...         Path(directory, "toy", version).mkdir(parents=True)
        ...         _ = Path(directory, "toy", version, "dataset_info.json").write_text("{}")
        ...     [path.name for path in prepared_versions("toy", Path(directory))]
        ['2.0.0', '10.0.0']
    """
    found = [path.parent for path in Path(data_dir, dataset).glob("[0-9]*.*/dataset_info.json")]
    # A copy such as 1.0.0.bak is not a version.
    versions = [path for path in found if re.fullmatch(r"\d+\.\d+\.\d+", path.name)]
    return sorted(versions, key=lambda path: [int(number) for number in path.name.split(".")])


def _newest_version(dataset: str, data_dir: Path) -> Path:
    """Returns the directory of the newest version, or raises; TFDS would try the network."""
    problem = "not there" if data_dir.is_dir() else "not there, as the directory does not exist"
    for directory in reversed(prepared_versions(dataset, data_dir)):
        if _file_format(directory / "dataset_info.json") == "array_record":
            return directory
        problem = "only in another format than ArrayRecord"
    raise ValueError(
        f"data_dir={str(data_dir)!r} must hold {dataset} as prepared by TFDS, but it is {problem}; "
        f"prepare it with: jaxmaml data prepare {dataset} --data-dir {data_dir}"
    )


def _builder(directory: Path) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(directory)
    except Exception as error:  # TFDS raises errors of many types for damaged files
        raise files.ReadError(f"{directory} cannot be read: {error}") from error


def _file_format(path: Path) -> str | None:
    try:
        return json.loads(path.read_text("utf-8")).get("fileFormat")
    except (OSError, ValueError, AttributeError) as error:
        raise files.ReadError(f"{path} cannot be read: {error}") from error


def _class_names(dataset: str, features: Any) -> tuple[str, ...]:
    import tensorflow_datasets as tfds

    if "image" not in features or not isinstance(features["image"], tfds.features.Image):
        raise ValueError(f"{dataset} has no feature 'image'; it has {', '.join(features)}")
    label = dict(features.items()).get("label")
    if not isinstance(label, tfds.features.ClassLabel):
        found = (f"{key} ({type(value).__name__})" for key, value in features.items())
        raise ValueError(
            f"{dataset} must have an integer feature 'label' that names classes (ClassLabel); "
            f"it has {', '.join(found)}"
        )
    return tuple(label.names)
