"""Records of TFDS datasets: numbers, labels, and damage with file and record."""

import json
import shutil

import numpy as np
import pytest

from jaxmaml.data.decoders import Decoder, Format
from jaxmaml.data.records import TFDSRecords, prepared_versions

NUM_IMAGES = 4  # per class of miniImageNet, see conftest.py


def train_shard(data_dir):
    (found,) = (data_dir / "mini_imagenet" / "1.0.0").glob("*-train.array_record*")
    return found


def test_labels_are_read_once_and_then_cached(copied, monkeypatch):
    labels = TFDSRecords("mini_imagenet", copied).labels()
    assert np.bincount(labels).tolist() == [NUM_IMAGES] * 100
    again = TFDSRecords("mini_imagenet", copied)
    monkeypatch.setattr(again, "_read_labels", lambda: pytest.fail("read again"))
    np.testing.assert_array_equal(again.labels(), labels)


def test_a_label_that_is_not_a_class_is_named(copied):
    records = TFDSRecords("mini_imagenet", copied)
    records.class_names = records.class_names[:99]  # as if one were missing
    with pytest.raises(ValueError, match=r"record \d+: label 99 is not one of the 99 classes"):
        records.labels()
    assert not records.label_path.exists()


def test_a_truncated_file_is_named(copied):
    path = train_shard(copied)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"mini_imagenet.*cannot be read"):
        TFDSRecords("mini_imagenet", copied).labels()


def test_a_corrupted_record_is_named(copied):
    records = TFDSRecords("mini_imagenet", copied, ("train",))
    decoder = Decoder(records, Format(6))
    path = train_shard(copied)
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    (used,) = np.nonzero(content)  # the rest is padding
    content[used[len(used) // 2] :][:200] = 0
    path.write_bytes(content.tobytes())
    with pytest.raises(ValueError, match=rf"{path.name} record \d+.* cannot be (read|decoded)"):
        decoder.read(np.arange(len(records)))


def test_records_are_numbered_through_tfds_splits(prepared):
    records = TFDSRecords("mini_imagenet", prepared, ("train", "test"))
    num_train = 64 * NUM_IMAGES
    assert len(records) == 84 * NUM_IMAGES
    assert records.where(0).endswith("record 0")
    assert "-train." in records.where(num_train - 1)
    assert records.where(num_train).endswith("record 0")
    assert "-test." in records.where(num_train)
    mixed = [num_train + 1, 3, num_train, 2]
    encoded = records.encoded(mixed)
    assert encoded == [records.encoded([number])[0] for number in mixed]
    assert len(set(encoded)) == 4


def test_a_dataset_without_a_label_is_refused(copied):
    path = copied / "mini_imagenet" / "1.0.0" / "features.json"
    features = json.loads(path.read_text())
    label = features["featuresDict"]["features"].pop("label")
    features["featuresDict"]["features"]["kind"] = label
    path.write_text(json.dumps(features))
    with pytest.raises(ValueError, match=r"must have an integer feature 'label'.*kind"):
        TFDSRecords("mini_imagenet", copied)


def test_the_newest_version_is_read(copied):
    first = copied / "mini_imagenet" / "1.0.0"
    first.rename(first.with_name("9.0.0"))
    (first.with_name("10.0.0")).mkdir()
    shutil.copytree(first.with_name("9.0.0"), first.with_name("9.0.0.bak"))
    versions = prepared_versions("mini_imagenet", copied)
    assert [path.name for path in versions] == ["9.0.0"]  # the other one is not complete
    assert TFDSRecords("mini_imagenet", copied).directory.name == "9.0.0"


def test_a_dataset_whose_description_is_damaged_is_named(copied):
    directory = copied / "mini_imagenet" / "1.0.0"
    whole = (directory / "dataset_info.json").read_text()
    for damaged in ("", "[]", whole[: len(whole) // 2]):
        (directory / "dataset_info.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"dataset_info\.json cannot be read"):
            TFDSRecords("mini_imagenet", copied)
    (directory / "dataset_info.json").write_text(whole)
    (directory / "features.json").write_text("{}")
    with pytest.raises(ValueError, match=r"mini_imagenet/1\.0\.0 cannot be read"):
        TFDSRecords("mini_imagenet", copied)
