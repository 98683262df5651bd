"""The label cache: the labels of a dataset are read once, without decoding images."""

import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jaxmaml import files


def label_path(name: str, directory: Path, tfds_splits: Sequence[str], fingerprint: str) -> Path:
    """Returns the file that keeps the labels of a prepared dataset, in the user's cache directory.

    Args:
        name: the name of the dataset in TFDS.
        directory: the directory of its version.
        tfds_splits: the TFDS splits whose records are read, in this order.
        fingerprint: a digest of its files.

    Example:
        >>> label_path("glyphs", Path("tfds/glyphs/1.0.0"), ("train",), "0123").parent.name
        'index'
    """
    key = files.digest(str(directory.resolve()), tuple(tfds_splits), fingerprint)
    stem = f"{name.replace('/', '-')}-{directory.name}-{key}"
    return files.cache_dir() / "index" / f"{stem}.npz"


def cached_labels(
    path: Path, num_records: int, num_classes: int, read: Callable[[], np.ndarray]
) -> np.ndarray:
    """Returns the labels of all records, from the cache if it is whole.

    Where the cache cannot be written, the labels are read each time, with a warning.

    Args:
        path: the file of the cache.
        num_records: the number of labels.
        num_classes: labels are in 0..num_classes-1.
        read: reads the labels if they are not in the cache.

    Returns:
        int32 `[num_records]`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = Path(directory, "labels.npz")
        ...     for labels in ([0, 1], [1, 1]):  # the second is not read
        ...         cached_labels(path, 2, 2, lambda: np.array(labels, np.int32)).tolist()
        [0, 1]
        [0, 1]
    """
    labels = _load(path, num_records, num_classes)
    if labels is not None:
        return labels
    labels = read()
    try:
        with files.atomic_write(path) as file:
            np.savez(file, labels=labels, checksum=_checksum(labels))
    except files.WriteError as error:
        warnings.warn(f"labels are read each time: {error}", stacklevel=2)
    return labels


def _load(path: Path, num_records: int, num_classes: int) -> np.ndarray | None:
    """Returns the labels in a file, or None unless it exists and is whole."""
    try:
        with path.open("rb") as file, np.load(file) as found:
            labels, checksum = found["labels"], int(found["checksum"])
    except Exception:  # absent, or damaged in any way
        return None
    fits = labels.shape == (num_records,) and checksum == _checksum(labels)
    return labels if fits and (labels < num_classes).all() else None


def _checksum(labels: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(labels).tobytes())
