"""The glyphs dataset, prepared from scratch: its classes, its images and its features."""

import subprocess
import sys
import unicodedata
from typing import Any

import jax
import numpy as np
import pytest

from jaxmaml import files
from jaxmaml.data import class_splits, datasets, pools
from jaxmaml.data.builders import glyphs as builder

NUM_CLASSES = {"train": 229, "val": 83, "test": 247}


@pytest.fixture(scope="session")
def data_dir():
    """The user's data directory, where glyphs are prepared once for the tests of both workers."""
    datasets.class_names("glyphs")
    return files.cache_dir() / "tfds"


def test_glyphs_are_prepared_without_tensorflow_and_with_nothing_printed(tmp_path):
    code = (
        "import sys\n"
        "from jaxmaml.data import datasets\n"
        "from jaxmaml.data.builders import glyphs\n"
        "glyphs.NUM_DRAWINGS = 1\n"  # which takes a moment
        f"assert len(datasets.load('glyphs', {str(tmp_path)!r})['val'].names) == 83\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


@pytest.fixture(scope="module")
def glyphs(data_dir):
    return datasets.load("glyphs", data_dir)


@pytest.fixture(scope="module")
def nearest_neighbor(glyphs):
    """Returns the accuracy of 600 test tasks, 5-way 1-shot with 5 query images per class."""
    sample = pools.sampler(glyphs["test"], num_tasks=600, way=5, shot=1, query=5)
    task = jax.tree.map(np.asarray, jax.jit(sample)(jax.random.key(0)))
    support, query = (batch["inputs"].reshape(600, -1, 28 * 28) for batch in task)
    distances = ((query[:, :, None] - support[:, None]) ** 2).sum(-1)
    return (distances.argmin(-1) == task.query["targets"]).mean(-1)


def test_sizes(glyphs, data_dir):
    assert [path.name for path in (data_dir / "glyphs").iterdir()] == ["1.0.0"]
    assert {split: len(pool.names) for split, pool in glyphs.items()} == NUM_CLASSES
    for split, pool in glyphs.items():
        assert pool.images.shape == (20 * NUM_CLASSES[split], 28, 28, 1)
        assert (pool.sizes == 20).all()


def test_split_by_script(glyphs):
    scripts = {split: {name.split()[0] for name in pool.names} for split, pool in glyphs.items()}
    assert scripts["train"] == {"LATIN", "DIGIT"}
    assert scripts["val"] == {"CYRILLIC"}
    assert scripts["test"] == {"GREEK", "ARMENIAN", "GEORGIAN", "LAO"}


def test_no_class_and_no_image_is_in_two_splits(glyphs):
    names = [name for pool in glyphs.values() for name in pool.names]
    assert len(set(names)) == len(names)
    images = [image.tobytes() for pool in glyphs.values() for image in np.asarray(pool.images)]
    assert len(set(images)) == len(images)


def test_images_are_white_ink_on_black(glyphs):
    images = np.asarray(glyphs["train"].images)
    assert images.dtype == np.uint8
    assert (images.max((1, 2, 3)) > 128).all()
    assert 0.03 < (images > 128).mean() < 0.3


def test_nearest_neighbor_on_pixels_gets_40_to_45_percent(nearest_neighbor):
    assert 0.40 <= nearest_neighbor.mean() <= 0.45


def test_features_as_tfds_reads_them(data_dir):
    import tensorflow_datasets as tfds

    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        source: Any = tfds.data_source("glyphs", split=name, data_dir=data_dir, download=False)
        assert len(source) == 20 * NUM_CLASSES[split]
    features = source.dataset_info.features
    assert set(features) == {"image", "label", "face", "name"}
    assert features["image"].shape == (28, 28, 1)
    assert features["label"].num_classes == sum(NUM_CLASSES.values())
    rows = [source[i] for i in range(50)]
    for row in rows:
        assert features["label"].names[row["label"]] == row["name"].decode()
        character = unicodedata.lookup(row["name"].decode())
        face = builder.FACES[row["face"]]
        faces = [drawn_face for _, drawn_face in builder.drawings(character)]
        images = [np.asarray(image) for image, _ in builder.drawings(character)]
        same = [np.array_equal(image, row["image"][..., 0]) for image in images]
        assert faces[same.index(True)] == face


@pytest.mark.slow
def test_preparing_twice_gives_the_same_images(glyphs, tmp_path):
    again = datasets.load("glyphs", tmp_path / "another")
    for split, pool in glyphs.items():
        assert again[split].names == pool.names
        # TFDS orders the images of a class by their keys only.
        np.testing.assert_array_equal(again[split].images, pool.images)


def test_drawings_cycle_over_the_faces_and_differ():
    drawn = list(builder.drawings("A"))
    assert [face for _, face in drawn] == [*builder.FACES, *builder.FACES[:4]]
    assert len({np.asarray(image).tobytes() for image, _ in drawn}) == 20


@pytest.mark.slow  # its cheap sibling is the one after it, and the example of `select` runs it
def test_the_class_split_is_the_one_that_select_draws():
    # Another FreeType may move a pair across the threshold, so the class split is committed.
    drawn = {name for names in builder.select().values() for name in names}
    listed = {name for names in class_splits.published("glyphs").values() for name in names}
    assert len(drawn ^ listed) <= 0.02 * len(listed)


def test_homoglyphs_are_dropped_across_scripts():
    listed = {name for names in class_splits.published("glyphs").values() for name in names}
    assert "LATIN CAPITAL LETTER A" in listed
    for name in (
        "GREEK CAPITAL LETTER ALPHA",
        "CYRILLIC CAPITAL LETTER A",
        "GREEK CAPITAL LETTER OMICRON",
        "CYRILLIC SMALL LETTER ER",
        "LATIN SMALL LETTER S",
        "ARMENIAN SMALL LETTER OH",
        "LATIN SMALL LETTER O WITH STROKE",
        "LATIN SMALL LETTER E WITH ACUTE",
    ):
        unicodedata.lookup(name)
        assert name not in listed
