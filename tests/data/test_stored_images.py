"""Images by row: sorted by class, in the splits that were asked for."""

import numpy as np
import pytest
from image_sets import noise

from jaxmaml.data import stored_images
from jaxmaml.data.decoders import Format
from jaxmaml.data.folders import FolderRecords

ONE_PIXEL = np.zeros((2, 3, 3, 1), np.uint8)


def test_from_arrays_sorts_by_class_and_keeps_every_image():
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
    found = stored_images.from_arrays(images, [2, 0, 2, 1, 0], ["a", "b", "c"])
    assert found.read(np.arange(5)).ravel().tolist() == [1, 4, 3, 0, 2]
    assert found.starts.tolist() == [0, 2, 3]
    assert found.sizes.tolist() == [2, 1, 2]
    assert found.labels().tolist() == [0, 0, 1, 2, 2]
    assert found.starts.dtype == found.sizes.dtype == np.int32


def test_rows_are_read_in_the_shape_of_their_array():
    images = noise(side=4)
    rows = np.array([[3, 0], [36, 3]])
    found = images.read(rows)
    assert found.shape == (2, 2, 4, 4, 3)
    np.testing.assert_array_equal(found[1, 0], images.read([36])[0])
    np.testing.assert_array_equal(found[0, 0], found[1, 1])


@pytest.mark.parametrize(
    ("images", "labels", "names", "error", "message"),
    [
        (ONE_PIXEL.astype(float), [0, 1], "ab", TypeError, "images must be uint8; got float64"),
        (ONE_PIXEL, [0.0, 1.0], "ab", TypeError, "labels must be integers"),
        (ONE_PIXEL[0], [0, 1], "ab", ValueError, r"images must be \[num_images"),
        (ONE_PIXEL, [0], "ab", ValueError, r"and labels \[num_images\]"),
        (ONE_PIXEL, [0, 2], "ab", ValueError, r"labels must be in 0\.\.1"),
        (ONE_PIXEL, [0, -1], "ab", ValueError, r"labels must be in 0\.\.1"),
        (ONE_PIXEL, [0, 0], "ab", ValueError, "class 'b' has no images"),
        (ONE_PIXEL, [0, 1], "aa", ValueError, "names must be distinct"),
    ],
)
def test_from_arrays_refuses(images, labels, names, error, message):
    with pytest.raises(error, match=message):
        stored_images.from_arrays(images, labels, list(names))


@pytest.mark.parametrize("cache", [True, False])
def test_each_split_has_the_images_of_its_classes(cache, folder):
    class_split = {"train": ["class3", "class0"], "val": ["class2"], "test": ["class1"]}
    records = FolderRecords(folder.path)
    opened = stored_images.open_images(records, class_split, Format(9), cache=cache)
    assert {split: found.names for split, found in opened.items()} == {
        split: tuple(names) for split, names in class_split.items()
    }
    assert opened["train"].sizes.tolist() == [5, 5]
    assert opened["val"].sizes.tolist() == [6]
    seen = [
        {image.tobytes() for image in found.read(np.arange(len(found.numbers)))}
        for found in opened.values()
    ]
    assert [len(images) for images in seen] == [10, 6, 4]
    assert len(set.union(*seen)) == 20
    labels = records.labels()[opened["train"].numbers]
    assert labels.tolist() == [3] * 5 + [0] * 5


@pytest.mark.parametrize(
    ("class_split", "message"),
    [
        ({"train": ["class0"], "val": ["nobody"]}, "'nobody'; it has 4: 'class0'"),
        (
            {"train": ["class0"], "val": ["class0"]},
            "'class0' is in split 'train' and in split 'val'",
        ),
    ],
)
def test_a_wrong_class_split_is_refused(class_split, message, folder):
    with pytest.raises(ValueError, match=message):
        stored_images.open_images(FolderRecords(folder.path), class_split, Format(6), cache=False)
