"""Data sets by name, as one set of images for each split of classes: "train", "val" and "test".

`images` leaves them on disk, for `stream.sampler`; `load` puts them on the device, for `pools.sampler`.
"""

import contextlib
import dataclasses
import io
import os
from pathlib import Path
from typing import Any, NamedTuple

from jaxmaml import files
from jaxmaml.data import augment, classes, episodes, pools
from jaxmaml.data import images as stored
from jaxmaml.data.images import Format, Images
from jaxmaml.data.pools import Pool
from jaxmaml.data.records import FolderRecords, Records, TFDSRecords


class Dataset(NamedTuple):
    """A data set that the package knows.

    Attributes:
        tfds: its name in TFDS.
        tfds_splits: which of its splits hold the images, in the order of their records.
        splits: the divisions into classes, the default first.
        format: what its images become; the size may be asked for otherwise.
        mean, std: of its pixels per channel, in 0..1.
    """

    tfds: str
    tfds_splits: tuple[str, ...]
    splits: tuple[str, ...]
    format: Format
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


_CIFAR = (augment.CIFAR_MEAN, augment.CIFAR_STD)
_IMAGENET = (augment.IMAGENET_MEAN, augment.IMAGENET_STD)
_PARTS = ("train", "validation", "test")

DATASETS: dict[str, Dataset] = {
    "glyphs": Dataset("glyphs", _PARTS, ("script",), Format(28, "L", "nearest")),
    "omniglot": Dataset(
        *("omniglot", ("train", "test"), ("finn", "vinyals")),
        Format(28, "L", "nearest", ink=True),
    ),
    "cifar-fs": Dataset("cifar100", ("train", "test"), ("cifar_fs",), Format(32), *_CIFAR),
    "fc100": Dataset("cifar100", ("train", "test"), ("fc100",), Format(32), *_CIFAR),
    "cub": Dataset("caltech_birds2011", ("train", "test"), ("cub",), Format(84), *_IMAGENET),
    "mini-imagenet": Dataset("mini_imagenet", _PARTS, ("mini_imagenet",), Format(84), *_IMAGENET),
}
"""By the name that presets and the command line use."""


def load(
    dataset: str,
    data_dir: str | os.PathLike[str] | None = None,
    split: str | None = None,
    image_size: int | None = None,
) -> dict[str, Pool]:
    """The pools of a data set, on the device: see `images`, which takes the same arguments."""
    opened = images(dataset, data_dir, split, image_size, cache=False)
    return {part: pools.from_images(found) for part, found in opened.items()}


def images(
    dataset: str,
    data_dir: str | os.PathLike[str] | None = None,
    split: str | None = None,
    image_size: int | None = None,
    *,
    cache: bool = True,
) -> dict[str, Images]:
    """The images of a data set by name, on disk.

    Omniglot (Lake et al. 2015) has binary images, ink 255 on 0, resized by nearest neighbour as in
    Finn et al. (2017); its split "finn" has that paper's sizes, 1100 / 100 / 423 characters, in a
    list of our own (theirs was never published), "vinyals" is the list of Vinyals et al. (2016).
    CIFAR-FS (Bertinetto et al. 2019) and FC100 (Oreshkin et al. 2018) merge the training and test
    images of CIFAR-100 in each class. Glyphs are synthetic, see `jaxmaml.data.glyphs`.

    Args:
        dataset: one of `DATASETS`; "tfds:NAME", any TFDS data set with an image and a class label;
            or "folder:PATH", with a folder of images for each class.
        data_dir: a TFDS data directory that holds it as ArrayRecord, which is only read; None for
            TFDS's default ($TFDS_DATA_DIR, else ~/tensorflow_datasets). Glyphs are prepared there
            if they are absent (some seconds), by default in the user's cache directory.
        split: which classes train, validate and test; None for the data set's first. For "tfds:"
            and "folder:" the path of a file, see `classes.read`.
        image_size: pixels a side; None is the data set's own, for "tfds:" and "folder:" 84.
        cache: see `images.open_images`.

    Returns:
        `Images` for each of "train", "val" and "test".

    Raises:
        ValueError: an unknown data set or split, or a directory that does not hold the data set.
    """
    if image_size is not None:
        episodes.check_counts(image_size=image_size)
    records = _own_records(dataset, data_dir)
    if records is not None:
        format = Format(image_size or 84, "L" if records.num_channels == 1 else "RGB")
        return stored.open_images(records, _read_split(dataset, split), format, cache=cache)
    known = _known(dataset)
    split = split or known.splits[0]
    if split not in known.splits:
        raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(known.splits)}")
    format = dataclasses.replace(known.format, size=image_size or known.format.size)
    records = TFDSRecords(known.tfds, _prepared(known, data_dir), known.tfds_splits)
    return stored.open_images(records, _listed(dataset, split), format, cache=cache)


def scaling(dataset: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, standard deviation) of a data set's pixels per channel, in 0..1, for `Augment`."""
    if dataset.partition(":")[0] in ("tfds", "folder"):
        return (0.5,), (0.5,)
    known = _known(dataset)
    return known.mean, known.std


def class_names(dataset: str, data_dir: Path | None = None) -> tuple[str, ...]:
    """Of all classes of a data set, which may be any prepared set of TFDS or "folder:PATH"."""
    records = _own_records(dataset, data_dir)
    if records is None:
        name = DATASETS[dataset].tfds if dataset in DATASETS else dataset
        records = TFDSRecords(name, data_directory(data_dir))
    return records.class_names


def _own_records(dataset: str, data_dir: str | os.PathLike[str] | None) -> Records | None:
    """Those of "tfds:NAME" and "folder:PATH"; None for a data set that the package knows."""
    kind, _, rest = dataset.partition(":")
    if kind == "folder" and rest:
        return FolderRecords(Path(rest).expanduser())
    return TFDSRecords(rest, data_directory(data_dir)) if kind == "tfds" and rest else None


def _known(dataset: str) -> Dataset:
    if dataset not in DATASETS:
        raise ValueError(
            f"dataset={dataset!r} is unknown; choose one of {', '.join(DATASETS)}, tfds:NAME or "
            "folder:PATH"
        )
    return DATASETS[dataset]


def _listed(dataset: str, split: str) -> dict[str, list[str]]:
    if dataset == "omniglot":
        return classes.omniglot(split)
    return classes.class_list("glyphs" if dataset == "glyphs" else split)


def _read_split(dataset: str, split: str | None) -> dict[str, list[str]]:
    if not split:
        raise ValueError(
            f"dataset {dataset!r} needs a split file, the classes that train, validate and test; "
            "jaxmaml data split draws one"
        )
    return classes.read(Path(split).expanduser())


def data_directory(data_dir: str | os.PathLike[str] | None) -> Path:
    if data_dir is None:
        data_dir = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return Path(data_dir).expanduser()


def _prepared(known: Dataset, data_dir: str | os.PathLike[str] | None) -> Path:
    """The directory of a data set; glyphs, which need no download, are made where they are absent."""
    if known.tfds != "glyphs":
        return data_directory(data_dir)
    from jaxmaml.data.glyphs import Glyphs

    directory = files.cache_dir() / "tfds" if data_dir is None else Path(data_dir).expanduser()
    builder = Glyphs(data_dir=directory, file_format="array_record")
    if not _is_complete(builder):
        _prepare(builder, directory)
    return directory


def _is_complete(builder: Any) -> bool:
    """As `builder.is_prepared()`, which warns where the directory is absent."""
    return Path(builder.data_dir, "dataset_info.json").exists()


def _prepare(builder: Any, data_dir: Path) -> None:
    """Prepares a set that needs no download; TFDS writes aside and renames when it is complete."""
    import tensorflow_datasets as tfds

    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        # TFDS prints its progress, which would run through a caller's table, bar or JSON.
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
            builder.download_and_prepare(download_config=config)
    except OSError as error:
        # Another process may have finished first: its directory is as good as ours.
        if not _is_complete(builder):
            raise ValueError(
                f"data_dir={str(data_dir)!r}: {builder.name} cannot be written there ({error}); "
                "choose a directory that can be written"
            ) from error
