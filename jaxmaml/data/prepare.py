"""Preparing data sets with TFDS's own builders, and listing what is prepared."""

import importlib.util
import socket
import threading
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import numpy as np

from jaxmaml.data import records, sources
from jaxmaml.data.records import TFDSRecords

CONNECT_SECONDS = 5
"""How long a host may take to answer before there is said to be no network."""


class Prepared(NamedTuple):
    """A prepared data set.

    Attributes:
        name: in TFDS.
        directory: of its newest version.
        num_classes, num_images: in all its splits.
        smallest: the class with fewest images, and how many.
        problem: why the numbers are not known, "" where they are.
    """

    name: str
    directory: Path
    num_classes: int = 0
    num_images: int = 0
    smallest: tuple[str, int] = ("", 0)
    problem: str = ""


def prepare(dataset: str, data_dir: Path | None = None, archive_dir: Path | None = None) -> Path:
    """Downloads and prepares a data set as ArrayRecord; nothing is done where it is there already.

    Args:
        dataset: one of `sources.DATASETS`, or the name of any TFDS data set.
        data_dir: the TFDS data directory; None for TFDS's default.
        archive_dir: where archives are that were downloaded before, and for miniImageNet the folder
            of images.

    Returns:
        The directory that holds it.

    Raises:
        ValueError: an unknown data set, no TensorFlow, no network, a folder of images that is not
            complete, a directory that cannot be written.
    """
    directory = sources.data_directory(data_dir)
    builder = _builder(dataset, directory)
    if Path(builder.data_dir, "dataset_info.json").exists():
        return Path(builder.data_dir)
    _check_archives(builder, archive_dir)
    import tensorflow_datasets as tfds

    # register_checksums stays off: an archive that is not the published one is refused.
    config = tfds.download.DownloadConfig(
        try_download_gcs=False, manual_dir=None if archive_dir is None else str(archive_dir)
    )
    try:
        builder.download_and_prepare(download_config=config)
    except OSError as error:
        raise ValueError(f"{dataset} cannot be prepared in {directory}: {error}") from error
    return Path(builder.data_dir)


def listing(data_dir: Path | None = None) -> list[Prepared]:
    """What is prepared as ArrayRecord in a TFDS data directory."""
    directory = sources.data_directory(data_dir)
    found = {path.parent.parent for path in directory.glob("**/dataset_info.json")}
    names = sorted(str(path.relative_to(directory)) for path in found)
    return [_describe(name, directory) for name in names]


def _describe(name: str, data_dir: Path) -> Prepared:
    newest = records.prepared_versions(name, data_dir)[-1:]
    try:
        found = TFDSRecords(name, data_dir, _splits(name))
        labels = found.labels()
    except ValueError as error:
        return Prepared(name, newest[0] if newest else data_dir / name, problem=str(error))
    sizes = np.bincount(labels, minlength=len(found.class_names))
    present = np.flatnonzero(sizes)
    least = present[sizes[present].argmin()]
    smallest = (found.class_names[least], int(sizes[least]))
    return Prepared(name, found.directory, len(present), len(labels), smallest)


def _splits(name: str) -> tuple[str, ...] | None:
    """Those that this package reads: Omniglot's small1 and small2 repeat images of its others."""
    known = (found for found in sources.DATASETS.values() if found.tfds == name)
    return next((found.tfds_splits for found in known), None)


def _builder(dataset: str, data_dir: Path) -> Any:
    import tensorflow_datasets as tfds

    name = sources.DATASETS[dataset].tfds if dataset in sources.DATASETS else dataset
    if name == "glyphs":
        from jaxmaml.data import glyphs as glyphs
    elif name == "mini_imagenet":
        from jaxmaml.data import mini_imagenet as mini_imagenet
    elif importlib.util.find_spec("tensorflow") is None:
        raise ValueError(
            f"preparing {dataset} needs TensorFlow: pip install 'jaxmaml[prepare]' "
            "(reading what is prepared does not)"
        )
    try:
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        raise ValueError(
            f"{dataset!r} is no data set of TFDS, nor one of {', '.join(sources.DATASETS)}"
        ) from None


def _check_archives(builder: Any, archive_dir: Path | None) -> None:
    """What has to be downloaded can be, or what has to be supplied is there."""
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS and archive_dir is None:
        raise ValueError(
            f"{builder.name} needs --archive-dir: {builder.MANUAL_DOWNLOAD_INSTRUCTIONS.strip()}"
        )
    if archive_dir is not None and not archive_dir.is_dir():
        raise ValueError(f"archive_dir={str(archive_dir)!r} is no directory")
    present = set() if archive_dir is None else {path.name for path in archive_dir.iterdir()}
    for url, info in (builder.url_infos or {}).items():
        if (info.filename or Path(urlparse(url).path).name) not in present:
            _check_network(urlparse(url).hostname, builder.name)


def _check_network(host: str | None, dataset: str) -> None:
    """Asks once, as TFDS would try for minutes."""
    answers: list[str] = []

    def ask() -> None:
        try:
            socket.create_connection((host, 443), timeout=CONNECT_SECONDS).close()
            answers.append("")
        except OSError as error:
            answers.append(str(error))

    # In a thread that nobody waits for: looking up a name knows no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS + 3)
    problem = answers[0] if answers else "no answer"
    if problem:
        raise ValueError(
            f"{dataset} has to be downloaded from {host}, which cannot be reached ({problem}); "
            "bring the archive and name its directory by --archive-dir"
        )
