"""Data sets as pools, one pool for each split of classes: "train", "val" and "test"."""

import contextlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from jaxmaml.data import pools
from jaxmaml.data.pools import Pool

GLYPHS_SPLITS = ("script",)
OMNIGLOT_SPLITS = ("finn", "vinyals")
DATASETS = ("glyphs", "omniglot")


def load(
    dataset: str, data_dir: str | os.PathLike[str] | None = None, split: str | None = None
) -> dict[str, Pool]:
    """The pools of a data set by name.

    Args:
        dataset: "glyphs" or "omniglot".
        data_dir: a TFDS data directory, see `glyphs` and `omniglot`.
        split: which classes train, validate and test; None for the data set's first: "script" for
            glyphs (its only one), "finn" or "vinyals" for Omniglot.

    Returns:
        A `Pool` for each of "train", "val" and "test".

    Raises:
        ValueError: for an unknown data set or split, or what the data set's own function raises.
    """
    if dataset == "glyphs":
        _check_split(split or "script", GLYPHS_SPLITS)
        return glyphs(data_dir)
    if dataset == "omniglot":
        return omniglot(data_dir, split or "finn")
    raise ValueError(f"dataset={dataset!r} is unknown; choose one of {', '.join(DATASETS)}")


def glyphs(data_dir: str | os.PathLike[str] | None = None) -> dict[str, Pool]:
    """Glyphs, 28x28: synthetic characters drawn from matplotlib's fonts, with no download.

    Train on Latin letters and digits, validate on Cyrillic, test on Greek, Armenian, Georgian and
    Lao; 20 drawings a class, ink 255 on 0. See `jaxmaml.data.glyphs`.

    Args:
        data_dir: a TFDS data directory, where the set is prepared (some seconds) if it is absent;
            None for the user's cache directory.

    Returns:
        A `Pool` for each of "train", "val" and "test", images `[num_images, 28, 28, 1]`.

    Raises:
        ValueError: if the set is absent and `data_dir` cannot be written.
    """
    from jaxmaml.data.glyphs import SIZE, Glyphs

    data_dir = _cache_dir() if data_dir is None else Path(data_dir).expanduser()
    builder = Glyphs(data_dir=data_dir, file_format="array_record")
    if not _is_complete(builder):
        _prepare(builder, data_dir)
    images, labels, names = _read("glyphs", data_dir, ("train", "validation", "test"), SIZE)
    return _pools(images, labels, names, class_list("glyphs"))


def omniglot(
    data_dir: str | os.PathLike[str] | None, split: str = "finn", image_size: int = 28
) -> dict[str, Pool]:
    """Omniglot (Lake et al. 2015) from a prepared TFDS directory; all 1,623 characters.

    Images are binary, ink 255 on 0, and resized by nearest neighbour, as in Finn et al. (2017).
    "finn" has that paper's sizes, 1100 / 100 / 423 characters, in a list of our own (theirs was
    never published); "vinyals" is the list of Vinyals et al. (2016), 1028 / 172 / 423.

    Args:
        data_dir: a TFDS data directory with Omniglot as ArrayRecord; None for TFDS's default
            ($TFDS_DATA_DIR, else ~/tensorflow_datasets). It is only read.
        split: "finn" or "vinyals".
        image_size: pixels a side.

    Returns:
        A `Pool` for each of "train", "val" and "test", images
        `[num_images, image_size, image_size, 1]`.

    Raises:
        ValueError: for an unknown split, or a directory that does not hold the data set.
    """
    _check_split(split, OMNIGLOT_SPLITS)
    pools.check_counts(image_size=image_size)
    if data_dir is None:
        data_dir = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    data_dir = Path(data_dir).expanduser()
    _check_prepared("omniglot", data_dir)
    images, labels, names = _read("omniglot", data_dir, ("train", "test"), image_size)
    inverted = np.where(images > 0, 0, 255).astype(np.uint8)  # ink is 0 as stored
    return _pools(inverted, labels, names, _omniglot_classes(split))


def class_list(name: str) -> dict[str, list[str]]:
    """The classes of "train", "val" and "test" as `splits/<name>.json` lists them.

    >>> {part: len(names) for part, names in class_list("omniglot_finn").items()}
    {'train': 1100, 'val': 100, 'test': 423}
    """
    text = resources.files("jaxmaml.data").joinpath("splits", f"{name}.json").read_text("utf-8")
    listed = json.loads(text)
    return {part: listed[part] for part in ("train", "val", "test")}


def _omniglot_classes(split: str) -> dict[str, list[str]]:
    listed = class_list(f"omniglot_{split}")
    if split == "vinyals":
        return {part: [_tfds_name(name) for name in names] for part, names in listed.items()}
    return listed


def _tfds_name(name: str) -> str:
    """`Greek/character01`, as published, is `Greek_0` in TFDS."""
    alphabet, character = name.split("/")
    return f"{alphabet}_{int(character.removeprefix('character')) - 1}"


def _check_split(split: str, allowed: Sequence[str]) -> None:
    if split not in allowed:
        raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(allowed)}")


def _check_prepared(dataset: str, data_dir: Path) -> None:
    """Looks before TFDS does, which would try the network for minutes."""
    found = [
        json.loads(path.read_text()).get("fileFormat")
        for path in data_dir.glob(f"{dataset}/[0-9]*/dataset_info.json")
    ]
    if "array_record" not in found:
        problem = "only in another format than ArrayRecord" if found else "not there"
        raise ValueError(
            f"data_dir={str(data_dir)!r} must hold {dataset} as prepared by TFDS, but it is "
            f"{problem}; prepare it (with TensorFlow, pip install 'jaxmaml[prepare]') by: "
            f"tfds build {dataset} --file_format=array_record --data_dir={data_dir}"
        )


def _cache_dir() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("jaxmaml") / "tfds"


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


def _read(
    dataset: str, data_dir: Path, splits: Sequence[str], image_size: int
) -> tuple[np.ndarray, np.ndarray, Sequence[str]]:
    """uint8 images `[num_images, image_size, image_size, 1]`, labels and the names of all classes.

    PNGs are decoded here: TFDS would expand Omniglot to three channels, and warn where OpenCV is
    not installed.
    """
    import tensorflow_datasets as tfds

    sources: list[Any] = [
        tfds.data_source(
            dataset,
            split=split,
            data_dir=data_dir,
            download=False,
            builder_kwargs={"file_format": "array_record"},
            decoders={"image": tfds.decode.SkipDecoding()},
        )
        for split in splits
    ]
    rows = [row for source in sources for row in source.__getitems__(range(len(source)))]
    images = np.stack([_decode(row["image"], image_size) for row in rows])
    labels = np.array([row["label"] for row in rows])
    return images[..., None], labels, sources[0].dataset_info.features["label"].names


def _decode(png: bytes, image_size: int) -> np.ndarray:
    """A PNG of any mode as grey uint8 `[image_size, image_size]`, resized by nearest neighbour."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        resized = image.resize((image_size, image_size), Image.Resampling.NEAREST)
        return np.asarray(resized.convert("L"))


def _pools(
    images: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    splits: Mapping[str, Sequence[str]],
) -> dict[str, Pool]:
    """One pool for each split, with the split's own classes in the split's own order."""
    return {split: _subset(images, labels, names, listed) for split, listed in splits.items()}


def _subset(
    images: np.ndarray, labels: np.ndarray, names: Sequence[str], listed: Sequence[str]
) -> Pool:
    index = {name: label for label, name in enumerate(names)}
    relabel = np.full(len(names), -1)
    relabel[[index[name] for name in listed]] = np.arange(len(listed))
    rows = relabel[labels] >= 0
    return pools.from_arrays(images[rows], relabel[labels[rows]], listed)
