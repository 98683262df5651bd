"""Fixtures of the tests of the experiments."""

import numpy as np
import pytest

from experiments.tiny import IMAGE_SHAPE, REGRESSION
from jaxmaml.data import datasets, pools, stored_images
from jaxmaml.experiments import candidates, compare


def _stored(shape):
    """Images of five classes, each with its own gray value."""
    labels = np.arange(40) % 5
    noise = np.random.default_rng(0).integers(0, 20, (40, *shape))
    gray = (50 * labels)[:, None, None, None] + noise
    return stored_images.from_arrays(gray.astype(np.uint8), labels, list("abcde"))


@pytest.fixture(scope="session")
def images():
    """The pool of each split: five classes, the same ones in each, with a gray value per class."""
    return dict.fromkeys(("train", "val", "test"), pools.from_images(_stored(IMAGE_SHAPE)))


@pytest.fixture
def small_datasets(monkeypatch):
    """Replaces every dataset by the images of `images`, which need no preparation."""

    def stored(dataset, data_dir, class_split, image_size, cache=False):
        shape = IMAGE_SHAPE if image_size is None else (image_size, image_size, 1)
        return dict.fromkeys(("train", "val", "test"), _stored(shape))

    def load(*where):
        return {split: pools.from_images(found) for split, found in stored(*where).items()}

    monkeypatch.setattr(datasets, "images", stored)
    monkeypatch.setattr(datasets, "load", load)


@pytest.fixture(scope="session")
def compared(tmp_path_factory):
    """(comparison, runs) of exact against first-order MAML on sinusoids."""
    out, specs = tmp_path_factory.mktemp("compare") / "run", candidates.comparison(REGRESSION)
    with compare.prepare(REGRESSION, specs, out, num_test_tasks=5) as comparison:
        return comparison, compare.execute(comparison)
