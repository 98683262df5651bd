"""Where encoded images lie: records of a prepared TFDS data set, or the files of a folder.

Both number their images 0, 1, 2 ..., know their labels, and give the bytes of any of them. They are
pickled to worker processes, which open the files for themselves, and run no JAX.
"""

import bisect
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxmaml import files
from jaxmaml.data import index

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif")


class Records(Protocol):
    """What images are read from.

    Attributes:
        name: what messages call it.
        class_names: of all classes there are.
        num_channels: of the images, where that is known, else 3.
        fingerprint: changes when the files do.
    """

    name: str
    class_names: tuple[str, ...]
    num_channels: int
    fingerprint: str

    def __len__(self) -> int: ...

    def labels(self) -> np.ndarray:
        """int32 `[len(self)]`, each an index into `class_names`."""
        ...

    def encoded(self, numbers: Sequence[int]) -> list[bytes]:
        """The encoded images of the records with these numbers."""
        ...

    def where(self, number: int) -> str:
        """The file, and in it the record, for messages."""
        ...


class TFDSRecords:
    """The records of a prepared TFDS data set, numbered through its splits one after another.

    Args:
        dataset: its name, with a config `name/config` where it has one.
        data_dir: a TFDS data directory that holds it as ArrayRecord. It is only read.
        splits: which of its splits; None is all, in the order of their names.

    Raises:
        ValueError: it is not there, in another format, or has no image, no label, or a label that
            is no integer.
    """

    def __init__(self, dataset: str, data_dir: Path, splits: Sequence[str] | None = None):
        import tensorflow_datasets as tfds

        self.name = dataset
        self.directory = _newest_version(dataset, data_dir)
        builder: Any = tfds.builder_from_directory(self.directory)
        self.splits = tuple(splits or sorted(builder.info.splits))
        self.class_names = _class_names(dataset, builder.info.features)
        self.num_channels = builder.info.features["image"].shape[-1] or 3
        self._lengths = [builder.info.splits[split].num_examples for split in self.splits]
        self._shards = [
            (Path(self.directory, file).name, length)
            for split in self.splits
            for file, length in zip(
                builder.info.splits[split].filenames,
                builder.info.splits[split].shard_lengths,
                strict=True,
            )
        ]
        self.fingerprint = files.fingerprint(
            [self.directory / "dataset_info.json", *(self.directory / f for f, _ in self._shards)]
        )

    def __len__(self) -> int:
        return sum(self._lengths)

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay here: another process opens its own.
        return {key: value for key, value in self.__dict__.items() if key != "_sources"}

    def labels(self) -> np.ndarray:
        """See `Records`; one pass over the records, in which no image is decoded, then cached."""
        return index.cached_labels(self, self._read_labels)

    def encoded(self, numbers: Sequence[int]) -> list[bytes]:
        return [row["image"] for row in self._rows(numbers)]

    def where(self, number: int) -> str:
        starts = np.cumsum([0, *(length for _, length in self._shards)]).tolist()
        shard = bisect.bisect_right(starts, number) - 1
        return f"{self.directory / self._shards[shard][0]} record {number - starts[shard]}"

    @functools.cached_property
    def _sources(self) -> list[Any]:
        import tensorflow_datasets as tfds

        builder: Any = tfds.builder_from_directory(self.directory)
        make_decoder: Any = tfds.decode.SkipDecoding
        decoders = {"image": make_decoder()}
        try:
            return [builder.as_data_source(split, decoders=decoders) for split in self.splits]
        except Exception as error:  # whatever the reader raises of damaged files
            raise ValueError(f"{self.directory} cannot be read: {error}") from error

    def _read_labels(self) -> np.ndarray:
        labels = []
        for first in range(0, len(self), 1000):
            numbers = range(first, min(first + 1000, len(self)))
            labels += [row["label"] for row in self._rows(numbers)]
        return np.array(labels, np.int32)

    def _rows(self, numbers: Sequence[int]) -> list[Any]:
        sources = self._sources  # whose own error names the directory
        try:
            return self._fetch(sources, numbers)
        except Exception:  # whatever the reader raises of damaged files
            return [self._row(sources, number) for number in numbers]  # finds the damaged one

    def _row(self, sources: list[Any], number: int) -> Any:
        try:
            return self._fetch(sources, [number])[0]
        except Exception as error:  # whatever the reader raises of damaged files
            raise ValueError(f"{self.where(number)} cannot be read: {error}") from error

    def _fetch(self, sources: list[Any], numbers: Sequence[int]) -> list[Any]:
        """One call a split, in the order asked for."""
        ends = np.cumsum(self._lengths).tolist()
        places: dict[int, list[int]] = {}
        for place, number in enumerate(numbers):
            places.setdefault(bisect.bisect_right(ends, number), []).append(place)
        rows: list[Any] = [None] * len(numbers)
        for split, at in places.items():
            first = ends[split] - self._lengths[split]
            found = sources[split].__getitems__([int(numbers[i]) - first for i in at])
            for i, row in zip(at, found, strict=True):
                rows[i] = row
        return rows


class FolderRecords:
    """The image files of a folder with a sub-folder for each class, in the order of their names.

    Args:
        path: the folder.

    Raises:
        ValueError: it does not exist, or holds no sub-folders with images.
    """

    def __init__(self, path: Path):
        if not path.is_dir():
            raise ValueError(f"folder {path} does not exist")
        found = sorted(file for file in path.glob("*/*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise ValueError(
                f"folder {path} must hold a folder of images ({' '.join(IMAGE_SUFFIXES)}) for each "
                "class, but there are none"
            )
        self.name = path.name
        self.num_channels = 3
        self.class_names = tuple(sorted({file.parent.name for file in found}))
        self.fingerprint = files.digest(str(path.resolve()), files.fingerprint(found))
        self._files = found

    def __len__(self) -> int:
        return len(self._files)

    def labels(self) -> np.ndarray:
        number = {name: i for i, name in enumerate(self.class_names)}
        return np.array([number[file.parent.name] for file in self._files], np.int32)

    def encoded(self, numbers: Sequence[int]) -> list[bytes]:
        return [self._read(int(number)) for number in numbers]

    def where(self, number: int) -> str:
        return str(self._files[number])

    def _read(self, number: int) -> bytes:
        try:
            return self._files[number].read_bytes()
        except OSError as error:
            raise ValueError(f"{self.where(number)} cannot be read: {error}") from error


def prepared_versions(dataset: str, data_dir: Path) -> list[Path]:
    """The directories of a data set's versions in a TFDS data directory, the newest last."""
    found = Path(data_dir, dataset).glob("[0-9]*.*/dataset_info.json")
    return sorted(
        (path.parent for path in found), key=lambda p: [int(n) for n in p.name.split(".")]
    )


def _newest_version(dataset: str, data_dir: Path) -> Path:
    """Looks before TFDS does, which would try the network for minutes."""
    problem = "not there"
    for directory in reversed(prepared_versions(dataset, data_dir)):
        if (
            json.loads((directory / "dataset_info.json").read_text())["fileFormat"]
            == "array_record"
        ):
            return directory
        problem = "only in another format than ArrayRecord"
    raise ValueError(
        f"data_dir={str(data_dir)!r} must hold {dataset} as prepared by TFDS, but it is {problem}; "
        f"prepare it by: jaxmaml data prepare {dataset} --data-dir {data_dir}"
    )


def _class_names(dataset: str, features: Any) -> tuple[str, ...]:
    import tensorflow_datasets as tfds

    if "image" not in features or not isinstance(features["image"], tfds.features.Image):
        raise ValueError(f"{dataset} has no feature 'image': it has {', '.join(features)}")
    label = dict(features.items()).get("label")
    if not isinstance(label, tfds.features.ClassLabel):
        raise ValueError(
            f"{dataset} must have an integer feature 'label' that names classes (ClassLabel); "
            f"it has {', '.join(f'{key} ({type(value).__name__})' for key, value in features.items())}"
        )
    return tuple(label.names)
