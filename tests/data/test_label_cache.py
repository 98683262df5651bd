"""The label cache: labels are read once, and again if the cache is damaged or the files change."""

import numpy as np
import pytest

from jaxmaml.data import label_cache
from jaxmaml.data.records import TFDSRecords

LABELS = np.arange(50, dtype=np.int32) % 7


def read_again():
    pytest.fail("the labels were read again")


def test_labels_are_read_once(tmp_path):
    path = tmp_path / "index" / "labels.npz"
    first = label_cache.cached_labels(path, 50, 7, lambda: LABELS)
    again = label_cache.cached_labels(path, 50, 7, read_again)
    np.testing.assert_array_equal(first, LABELS)
    np.testing.assert_array_equal(again, LABELS)


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "of another set"])
def test_a_damaged_cache_is_read_again(damage, tmp_path):
    path = tmp_path / "labels.npz"
    label_cache.cached_labels(path, 50, 7, lambda: LABELS)
    whole = path.read_bytes()
    damaged = {"empty": b"", "cut": whole[:-40]}.get(damage)
    if damage == "flipped":
        where = whole.index(LABELS.tobytes()[:64])
        damaged = whole[:where] + bytes([whole[where] ^ 1]) + whole[where + 1 :]
    if damaged is None:
        np.savez(path, labels=LABELS[:5], checksum=0)
    else:
        path.write_bytes(damaged)
    found = label_cache.cached_labels(path, 50, 7, lambda: LABELS)
    np.testing.assert_array_equal(found, LABELS)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(("num_records", "num_classes"), [(49, 7), (50, 6)])
def test_a_cache_of_another_size_is_not_used(num_records, num_classes, tmp_path):
    path = tmp_path / "labels.npz"
    label_cache.cached_labels(path, 50, 7, lambda: LABELS)
    other = np.zeros(num_records, np.int32)
    found = label_cache.cached_labels(path, num_records, num_classes, lambda: other)
    np.testing.assert_array_equal(found, other)


def test_a_set_that_is_prepared_again_has_another_file(copied):
    before = TFDSRecords("mini_imagenet", copied).label_path
    (shard,) = (copied / "mini_imagenet" / "1.0.0").glob("*-train.array_record*")
    shard.touch()
    assert TFDSRecords("mini_imagenet", copied).label_path != before


def test_other_tfds_splits_have_another_file(prepared):
    paths = {
        TFDSRecords("mini_imagenet", prepared, tfds_splits).label_path
        for tfds_splits in (None, ("train",), ("test", "train"))
    }
    assert len(paths) == 3


def test_labels_are_read_without_a_cache_directory_that_can_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file")
    path = tmp_path / "cache" / "labels.npz"
    with pytest.warns(UserWarning, match="labels are read each time: .*labels.npz cannot be"):
        found = label_cache.cached_labels(path, 50, 7, lambda: LABELS)
    np.testing.assert_array_equal(found, LABELS)
