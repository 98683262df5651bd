"""Which class each record is of: read once, without decoding images, and kept in the cache."""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxmaml import files

if TYPE_CHECKING:
    from jaxmaml.data.records import TFDSRecords


def cached_labels(records: "TFDSRecords", read: Callable[[], np.ndarray]) -> np.ndarray:
    """The labels of all records: from the cache where it is whole and of these files, else read.

    Args:
        records: whose name, version, splits and fingerprint the cache is of.
        read: reads them.
    """
    path = index_path(records)
    labels = _load(path, len(records), len(records.class_names))
    if labels is not None:
        return labels
    labels = read()
    _check(labels, records)
    with files.atomic_write(path) as file:
        np.savez(file, labels=labels, checksum=_checksum(labels))
    return labels


def index_path(records: "TFDSRecords") -> Path:
    """Where the labels of these records are kept."""
    key = files.digest(str(records.directory.resolve()), records.splits, records.fingerprint)
    version = records.directory.name
    return files.cache_dir() / "index" / f"{records.name.replace('/', '-')}-{version}-{key}.npz"


def _load(path: Path, num_records: int, num_classes: int) -> np.ndarray | None:
    """None unless the file is there and whole."""
    try:
        with path.open("rb") as file, np.load(file) as found:
            labels, checksum = found["labels"], int(found["checksum"])
    except Exception:  # absent or damaged, in whichever way
        return None
    fits = labels.shape == (num_records,) and checksum == _checksum(labels)
    return labels if fits and (labels < num_classes).all() else None


def _check(labels: np.ndarray, records: "TFDSRecords") -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= len(records.class_names)))
    if wrong.size:
        raise ValueError(
            f"{records.where(int(wrong[0]))}: label {labels[wrong[0]]} is none of the "
            f"{len(records.class_names)} classes of {records.name}"
        )


def _checksum(labels: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(labels).tobytes())
