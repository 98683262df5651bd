"""Fixtures: a folder of images, and miniImageNet prepared from tiny images."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from image_sets import write_folder, write_split
from PIL import Image

from jaxmaml.data import class_splits, datasets, preparation
from jaxmaml.data.stored_images import Images


class Folder(NamedTuple):
    """A folder of images, and a cache directory that no other test uses.

    Attributes:
        path: one sub-folder per class.
        split: a split file.
        cache: the directory of decoded images.
        open: returns the training images; keyword arguments are those of `datasets.images`.
    """

    path: Path
    split: Path
    cache: Path
    open: Callable[..., Images]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Folder:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_folder(tmp_path / "folder")
    split = write_split(tmp_path / "split.json")

    def open_train(**options) -> Images:
        return datasets.images(f"folder:{path}", None, str(split), 6, **options)["train"]

    return Folder(path, split, tmp_path / "cache" / "jaxmaml" / "images", open_train)


@pytest.fixture(scope="session")
def synsets(tmp_path_factory) -> Path:
    """The folder of images that miniImageNet is prepared from: four tiny images per class."""
    folder = tmp_path_factory.mktemp("archive")
    rng = np.random.default_rng(0)
    for names in class_splits.published("mini_imagenet").values():
        for name in names:
            (folder / name).mkdir()
            for number in range(4):
                pixels = rng.integers(0, 256, (5, 7, 3), np.uint8)
                Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, synsets) -> Path:
    """A TFDS data directory that holds miniImageNet. Tests only read it."""
    directory = tmp_path_factory.mktemp("tfds")
    preparation.prepare("mini-imagenet", directory, synsets)
    return directory


@pytest.fixture
def copied(prepared, tmp_path, monkeypatch) -> Path:
    """A copy of `prepared` to damage, and a cache directory that no other test uses."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shutil.copytree(prepared, tmp_path / "tfds")
