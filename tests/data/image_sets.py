"""Small sets of images, and statistics of the tasks drawn from them, for several test modules."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from jaxmaml.data import pools, stored_images
from jaxmaml.data.pools import Pool
from jaxmaml.data.stored_images import Images

CHI_SQUARE_999 = {5: 20.52, 6: 22.46, 9: 27.88, 11: 31.26, 15: 37.70}
"""The 99.9th percentile of the chi-square distribution, by degrees of freedom."""


def pool_of(sizes, side=2) -> Pool:
    """Returns a pool: an image's first pixel is its class, the second its number in the class."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    images = np.zeros((len(labels), side, side, 1), np.uint8)
    images[:, 0, 0, 0] = labels
    images[:, 0, 1, 0] = np.concatenate([np.arange(size) for size in sizes])
    return pools.from_arrays(images, labels, [f"class {i}" for i in range(len(sizes))])


def identities(batch) -> np.ndarray:
    """Returns (class, number in the class) of each image of `pool_of`, `[num_tasks, n, 2]`."""
    pixels = np.asarray(batch["inputs"])[:, :, 0, :2, 0] * 255
    return np.rint(pixels).astype(int)


def chi_square(counts) -> float:
    """Returns the chi-square statistic of counts that are expected to be equal."""
    expected = np.mean(counts)
    return np.sum((counts - expected) ** 2 / expected)


def noise(sizes=(5, 9, 4, 12, 7), side=6, channels=3) -> Images:
    """Returns images of noise in memory, in classes of these sizes."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    pixels = np.random.default_rng(0).integers(0, 256, (labels.size, side, side, channels))
    names = [f"class {i}" for i in range(len(sizes))]
    return stored_images.from_arrays(pixels.astype(np.uint8), labels, names)


def write_folder(path: Path, sizes=(5, 4, 6, 5), side=9) -> Path:
    """Writes a folder of PNG files of noise, with one sub-folder per class."""
    rng = np.random.default_rng(1)
    for label, size in enumerate(sizes):
        (path / f"class{label}").mkdir(parents=True)
        for number in range(size):
            pixels = rng.integers(0, 256, (side, side, 3), np.uint8)
            Image.fromarray(pixels).save(path / f"class{label}" / f"{number}.png")
    return path


def write_split(path: Path) -> Path:
    """Writes a split file of the classes of `write_folder`: two for train, one for val and test."""
    names = [f"class{i}" for i in range(4)]
    path.write_text(json.dumps({"train": names[:2], "val": names[2:3], "test": names[3:]}))
    return path
