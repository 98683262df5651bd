"""Preparation of datasets with TFDS's own builders, and a list of those that are prepared."""

import importlib.util
import socket
import threading
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import numpy as np

from jaxmaml import stages
from jaxmaml.data import datasets, records, tfds_progress
from jaxmaml.data.records import TFDSRecords

CONNECT_SECONDS = 5
"""The longest that a host may take to answer before the network counts as absent."""


class Prepared(NamedTuple):
    """A prepared dataset.

    Attributes:
        name: its name in TFDS.
        directory: the directory of its newest version.
        num_classes, num_images: over all TFDS splits that are read.
        smallest: the class with the fewest images, and their number.
        problem: why these numbers are not known, or "".

    Example:
        >>> Prepared("glyphs", Path("tfds/glyphs/1.0.0"), 559, 11180, ("DIGIT ZERO", 20)).problem
        ''
    """

    name: str
    directory: Path
    num_classes: int = 0
    num_images: int = 0
    smallest: tuple[str, int] = ("", 0)
    problem: str = ""


def prepare(dataset: str, data_dir: Path | None = None, archive_dir: Path | None = None) -> Path:
    """Downloads and prepares a dataset as ArrayRecord, unless it is there already.

    Args:
        dataset: one of `datasets.DATASETS`, or the name of any TFDS dataset.
        data_dir: the TFDS data directory. Defaults to TFDS's.
        archive_dir: a directory of archives that were downloaded before, or for miniImageNet the
            folder of images.

    Returns:
        The directory that holds the dataset.

    Raises:
        ValueError: the dataset is unknown or needs no archives, TensorFlow or the network is missing,
            the folder of images is incomplete, or the directory cannot be written.

    Example:
        >>> from jaxmaml import files
        >>> _ = datasets.images("glyphs")  # prepares the dataset, if it is not there
        >>> prepare("glyphs", files.cache_dir() / "tfds").name
        '1.0.0'
    """
    directory = datasets.data_directory(data_dir)
    builder = _builder(dataset, directory)
    needs_archives = builder.MANUAL_DOWNLOAD_INSTRUCTIONS or builder.url_infos
    if archive_dir is not None and not needs_archives:
        raise ValueError(f"archive_dir has no effect on {builder.name}: leave it out")

    # Nothing to do?
    if Path(builder.data_dir, "dataset_info.json").exists():
        return Path(builder.data_dir)

    # Download and prepare. register_checksums stays off: TFDS refuses an archive that is not the
    # published one.
    _check_archives(builder, archive_dir)
    import tensorflow_datasets as tfds

    config = tfds.download.DownloadConfig(
        try_download_gcs=False, manual_dir=None if archive_dir is None else str(archive_dir)
    )
    try:
        with stages.stage(f"preparing {builder.name}"), tfds_progress.as_stages():
            builder.download_and_prepare(download_config=config)
    except OSError as error:
        raise ValueError(f"{dataset} cannot be prepared in {directory}: {error}") from error
    return Path(builder.data_dir)


def listing(data_dir: Path | None = None) -> list[Prepared]:
    """Returns the datasets that are prepared in a TFDS data directory.

    Args:
        data_dir: the TFDS data directory. Defaults to TFDS's.

    Example:
        >>> from jaxmaml import files
        >>> _ = datasets.images("glyphs")  # prepares the dataset, if it is not there
        >>> [found.name for found in listing(files.cache_dir() / "tfds")]
        ['glyphs']
    """
    directory = datasets.data_directory(data_dir)
    found = {path.parent.parent for path in directory.glob("**/dataset_info.json")}
    names = sorted(str(path.relative_to(directory)) for path in found)
    return [_describe(name, directory) for name in names]


def _describe(name: str, data_dir: Path) -> Prepared:
    newest = records.prepared_versions(name, data_dir)[-1:]
    try:
        found = TFDSRecords(name, data_dir, datasets.tfds_splits(name))
        labels = found.labels()
    except ValueError as error:
        return Prepared(name, newest[0] if newest else data_dir / name, problem=str(error))
    sizes = np.bincount(labels, minlength=len(found.class_names))
    present = np.flatnonzero(sizes)
    least = present[sizes[present].argmin()]
    smallest = (found.class_names[least], int(sizes[least]))
    return Prepared(name, found.directory, len(present), len(labels), smallest)


def _builder(dataset: str, data_dir: Path) -> Any:
    import tensorflow_datasets as tfds

    # The builders of this package register themselves, and need no TensorFlow.
    name = datasets.DATASETS[dataset].tfds if dataset in datasets.DATASETS else dataset
    own_builder = f"jaxmaml.data.builders.{name}"
    if name.isidentifier() and importlib.util.find_spec(own_builder) is not None:
        importlib.import_module(own_builder)
    elif importlib.util.find_spec("tensorflow") is None:
        raise ValueError(
            f"preparing {dataset} needs TensorFlow: pip install 'jaxmaml[prepare]' "
            "(reading prepared data does not)"
        )
    try:
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        raise ValueError(
            f"{dataset!r} is not a dataset of TFDS, nor one of {', '.join(datasets.DATASETS)}"
        ) from None


def _check_archives(builder: Any, archive_dir: Path | None) -> None:
    """Checks that what the user supplies is there, and that the rest can be downloaded."""
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS and archive_dir is None:
        raise ValueError(
            f"{builder.name} needs --archive-dir: {builder.MANUAL_DOWNLOAD_INSTRUCTIONS.strip()}"
        )
    if archive_dir is not None and not archive_dir.is_dir():
        raise ValueError(f"archive_dir={str(archive_dir)!r} is not a directory")
    present = set() if archive_dir is None else {path.name for path in archive_dir.iterdir()}
    for url, info in (builder.url_infos or {}).items():
        if (info.filename or Path(urlparse(url).path).name) not in present:
            _check_network(urlparse(url).hostname, builder.name)


def _check_network(host: str | None, dataset: str) -> None:
    """Connects to a host once, since TFDS would try for minutes."""
    answers: list[str] = []

    def ask() -> None:
        try:
            socket.create_connection((host, 443), timeout=CONNECT_SECONDS).close()
            answers.append("")
        except OSError as error:
            answers.append(str(error))

    # In a daemon thread, because the lookup of a host name has no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS + 3)
    problem = answers[0] if answers else "no answer"
    if problem:
        raise ValueError(
            f"{dataset} must be downloaded from {host}, which cannot be reached ({problem}); "
            "download the archive elsewhere and pass its directory with --archive-dir"
        )
