"""Datasets by name: one set of images per split, "train", "val" and "test".

`images` leaves them on disk, for `stream.sampler`. `load` puts them on the device, for
`pools.sampler`.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxmaml import files, stages
from jaxmaml.checks import check_count
from jaxmaml.data import augmentation, class_splits, pools, tfds_progress
from jaxmaml.data.class_splits import ClassSplit
from jaxmaml.data.decoders import Format
from jaxmaml.data.folders import FolderRecords
from jaxmaml.data.pools import Pool
from jaxmaml.data.records import Records, TFDSRecords
from jaxmaml.data.stored_images import Images, open_images


class Dataset(NamedTuple):
    """A dataset that the package knows by name.

    Attributes:
        tfds: its name in TFDS.
        tfds_splits: the TFDS splits that hold the images, in the order of their records.
        class_splits: the names of its class splits; the first is the default.
        format: the form that images are decoded to. The caller may choose another size.
        mean, std: mean and standard deviation of its pixels per channel, in 0..1.

    Example:
        >>> DATASETS["omniglot"].class_splits
        ('finn', 'vinyals')
    """

    tfds: str
    tfds_splits: tuple[str, ...]
    class_splits: tuple[str, ...]
    format: Format
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


_TFDS_SPLITS = ("train", "validation", "test")
_CIFAR = (augmentation.CIFAR_MEAN, augmentation.CIFAR_STD)
_IMAGENET = (augmentation.IMAGENET_MEAN, augmentation.IMAGENET_STD)
_OWN_IMAGE_SIZE = 84

DATASETS: dict[str, Dataset] = {
    "glyphs": Dataset("glyphs", _TFDS_SPLITS, ("script",), Format(28, "L", "nearest")),
    "omniglot": Dataset(
        *("omniglot", ("train", "test"), ("finn", "vinyals")),
        Format(28, "L", "nearest", ink=True),
    ),
    "cifar-fs": Dataset("cifar100", ("train", "test"), ("cifar_fs",), Format(32), *_CIFAR),
    "fc100": Dataset("cifar100", ("train", "test"), ("fc100",), Format(32), *_CIFAR),
    "cub": Dataset("caltech_birds2011", ("train", "test"), ("cub",), Format(84), *_IMAGENET),
    "mini-imagenet": Dataset(
        *("mini_imagenet", _TFDS_SPLITS, ("mini_imagenet",)), Format(84), *_IMAGENET
    ),
}
"""The datasets by the name that presets and the command line use."""


def load(
    dataset: str,
    data_dir: str | os.PathLike[str] | None = None,
    class_split: str | ClassSplit | None = None,
    image_size: int | None = None,
) -> dict[str, Pool]:
    """Returns the pools of a dataset, with all images on the device.

    Args:
        dataset, data_dir, class_split, image_size: see `images`.

    Returns:
        A `Pool` for each of "train", "val" and "test".

    Raises:
        ValueError: see `images`.

    Example:
        >>> {split: len(pool.names) for split, pool in load("glyphs").items()}
        {'train': 229, 'val': 83, 'test': 247}
    """
    opened = images(dataset, data_dir, class_split, image_size, cache=False)
    return {split: pools.from_images(found) for split, found in opened.items()}


def images(
    dataset: str,
    data_dir: str | os.PathLike[str] | None = None,
    class_split: str | ClassSplit | None = None,
    image_size: int | None = None,
    *,
    cache: bool = True,
) -> dict[str, Images]:
    """Returns the images of a dataset, which stay on disk.

    - Omniglot (Lake et al. 2015) has binary images with ink 255 on 0, resized by nearest neighbor
      as in Finn et al. (2017). The class split "finn" has the sizes of that paper, 1100 / 100 / 423
      characters; the list is our own, since theirs was never published. "vinyals" is the list of
      Vinyals et al. (2016).
    - CIFAR-FS (Bertinetto et al. 2019) and FC100 (Oreshkin et al. 2018) merge the training and test
      images of CIFAR-100 in each class.
    - Glyphs are synthetic, see `jaxmaml.data.builders.glyphs`.
    - Whatever their mode, images become 8 bits per channel, upright, on white, see `decoders`.

    Args:
        dataset: one of `DATASETS`; "tfds:NAME", any TFDS dataset with an image and a class label;
            or "folder:PATH", a folder with one folder of images per class, see
            `folders.FolderRecords`.
        data_dir: a TFDS data directory that holds the dataset as ArrayRecord. It is only read,
            except that glyphs are prepared there if they are absent, which takes some seconds.
            Defaults to TFDS's ($TFDS_DATA_DIR, else ~/tensorflow_datasets), for glyphs to the
            user's cache directory.
        class_split: the name of a class split of the dataset, which defaults to its first and which
            "tfds:" and "folder:" have not; the path of a file, see `class_splits.read`; or the class
            names of each split.
        image_size: height and width in pixels. Defaults to the dataset's own, or 84 for "tfds:"
            and "folder:".
        cache: whether images are decoded once, see `stored_images.open_images`.

    Returns:
        `Images` for each of "train", "val" and "test".

    Raises:
        TypeError: `image_size` is not an integer.
        ValueError: the dataset or the class split is unknown, or the directory does not hold the
            dataset.

    Example:
        >>> images("glyphs", image_size=14)["val"].shape
        (14, 14, 1)
    """
    if image_size is not None:
        image_size = check_count("image_size", image_size)

    # A dataset of the user.
    records = _own_records(dataset, data_dir)
    if records is not None:
        format = Format(image_size or _OWN_IMAGE_SIZE, "L" if records.num_channels == 1 else "RGB")
        listed = _own_class_split(dataset, class_split)
        return open_images(records, listed, format, cache=cache)

    # A dataset that the package knows.
    known = _known(dataset)
    listed = _known_class_split(dataset, class_split or known.class_splits[0])
    format = dataclasses.replace(known.format, size=image_size or known.format.size)
    records = TFDSRecords(known.tfds, _prepared(known, data_dir), known.tfds_splits)
    return open_images(records, listed, format, cache=cache)


def scaling(dataset: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and standard deviation of a dataset's pixels, for `Augment`.

    Args:
        dataset: see `images`.

    Returns:
        (mean, std), each per channel and in 0..1; 0.5 for a dataset of the user.

    Raises:
        ValueError: the dataset is unknown.

    Example:
        >>> scaling("cifar-fs")[0]
        (0.5071, 0.4866, 0.4409)
    """
    if dataset.partition(":")[0] in ("tfds", "folder"):
        return (0.5,), (0.5,)
    known = _known(dataset)
    return known.mean, known.std


def format_of(dataset: str, image_shape: tuple[int, ...]) -> Format:
    """Returns the form that the images of a dataset were decoded to, without reading the dataset.

    Args:
        dataset: see `images`.
        image_shape: (height, width, channels) of the images, as `images` gave them.

    Raises:
        ValueError: the dataset is unknown.

    Example:
        >>> format_of("folder:/my/images", (32, 32, 3))
        Format(size=32, mode='RGB', resample='bilinear', ink=False)
    """
    size, _, channels = image_shape
    if dataset.partition(":")[0] in ("tfds", "folder"):
        return Format(size, "L" if channels == 1 else "RGB")
    return dataclasses.replace(_known(dataset).format, size=size)


def class_names(dataset: str, data_dir: str | os.PathLike[str] | None = None) -> tuple[str, ...]:
    """Returns the names of all classes of a dataset.

    Args:
        dataset: see `images`, or the name of any TFDS dataset that is prepared.
        data_dir: see `images`.

    Raises:
        ValueError: the dataset is not there.

    Example:
        >>> len(class_names("glyphs"))
        559
    """
    records = _own_records(dataset, data_dir)
    if records is None and dataset in DATASETS:
        known = DATASETS[dataset]
        records = TFDSRecords(known.tfds, _prepared(known, data_dir))
    if records is None:
        _check_not_a_folder(dataset)
        records = TFDSRecords(dataset, data_directory(data_dir))
    return records.class_names


def data_directory(data_dir: str | os.PathLike[str] | None) -> Path:
    """Returns the TFDS data directory.

    Args:
        data_dir: a directory, whose `~` is expanded. None is TFDS's default: $TFDS_DATA_DIR, else
            ~/tensorflow_datasets.

    Example:
        >>> data_directory("/data").name
        'data'
    """
    if data_dir is None:
        data_dir = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return files.expanded(data_dir)


def _own_records(dataset: str, data_dir: str | os.PathLike[str] | None) -> Records | None:
    """Returns the records of "tfds:NAME" or "folder:PATH", or None for another name."""
    kind, colon, rest = dataset.partition(":")
    if kind not in ("folder", "tfds") or not colon:
        return None
    if not rest:
        raise ValueError(
            f"dataset {dataset!r} names nothing: write folder:PATH, with one folder of images per "
            "class, or tfds:NAME"
        )
    if kind == "folder":
        return FolderRecords(files.expanded(rest))
    return TFDSRecords(rest, data_directory(data_dir), tfds_splits(rest))


def tfds_splits(name: str) -> tuple[str, ...] | None:
    """Returns the TFDS splits that are read of a dataset of TFDS; None for all.

    Omniglot's small1 and small2 repeat images of the others.

    Example:
        >>> tfds_splits("omniglot"), tfds_splits("mnist")
        (('train', 'test'), None)
    """
    known = (found for found in DATASETS.values() if found.tfds == name)
    return next((found.tfds_splits for found in known), None)


def _check_not_a_folder(dataset: str) -> None:
    if files.expanded(dataset).is_dir():
        raise ValueError(f"{dataset!r} is a folder; its images are the dataset 'folder:{dataset}'")


def _known(dataset: str) -> Dataset:
    if dataset not in DATASETS:
        _check_not_a_folder(dataset)
        raise ValueError(
            f"dataset={dataset!r} is unknown; choose one of {', '.join(DATASETS)}, tfds:NAME or "
            "folder:PATH"
        )
    return DATASETS[dataset]


def is_split_file(dataset: str, name: str) -> bool:
    """Returns whether the name of a class split is the path of a file.

    Args:
        dataset: see `images`.
        name: the name, which is not empty.

    Example:
        >>> is_split_file("omniglot", "finn"), is_split_file("omniglot", "mine.json")
        (False, True)
    """
    if dataset not in DATASETS:
        return True
    is_file = name.endswith(".json") or files.expanded(name).is_file()
    return is_file and name not in DATASETS[dataset].class_splits


def _known_class_split(dataset: str, name: str | ClassSplit) -> ClassSplit:
    if isinstance(name, Mapping):
        return name
    if is_split_file(dataset, name):
        return class_splits.read(files.expanded(name))
    names = DATASETS[dataset].class_splits
    if name not in names:
        raise ValueError(
            f"split={name!r} is unknown; choose one of {', '.join(names)}, or a file that "
            "jaxmaml data split wrote"
        )
    if dataset == "omniglot":
        return class_splits.omniglot(name)
    return class_splits.published("glyphs" if dataset == "glyphs" else name)


def _own_class_split(dataset: str, path: str | ClassSplit | None) -> ClassSplit:
    if isinstance(path, Mapping):
        return path
    needs = (
        f"dataset {dataset!r} needs a split file, which lists the classes for train, val and test"
    )
    if not path:
        raise ValueError(f"{needs}; jaxmaml data split draws one")
    file = files.expanded(path)
    if not file.exists():
        raise ValueError(f"{needs}; there is no file {path!r}, and jaxmaml data split draws one")
    return class_splits.read(file)


def _prepared(known: Dataset, data_dir: str | os.PathLike[str] | None) -> Path:
    """Returns the directory of a dataset. Glyphs are prepared if they are absent."""
    if known.tfds != "glyphs":
        return data_directory(data_dir)
    from jaxmaml.data.builders.glyphs import Glyphs

    directory = files.cache_dir() / "tfds" if data_dir is None else files.expanded(data_dir)
    builder = Glyphs(data_dir=directory, file_format="array_record")
    if not _is_complete(builder):
        _prepare(builder, directory)
    return directory


def _is_complete(builder: Any) -> bool:
    """Returns what `builder.is_prepared()` does, which warns if the directory is absent."""
    return Path(builder.data_dir, "dataset_info.json").exists()


def _prepare(builder: Any, data_dir: Path) -> None:
    """Prepares a dataset that needs no download. TFDS renames the directory when it is complete."""
    import tensorflow_datasets as tfds

    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        with stages.stage(f"preparing {builder.name}"), tfds_progress.as_stages():
            builder.download_and_prepare(download_config=config)
    except OSError as error:
        # Another process may have been faster: its directory is as good as ours.
        if not _is_complete(builder):
            raise ValueError(
                f"data_dir={str(data_dir)!r}: {builder.name} cannot be written there ({error}); "
                "choose a directory that can be written"
            ) from error
