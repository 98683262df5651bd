"""Prepared sets and folders: labels once and cached, faults with file and record, splits from files."""

import json
import shutil
import socket
import threading
import time

import numpy as np
import pytest
from PIL import Image

from jaxmaml import files
from jaxmaml.data import classes, index, prepare, records, sources
from jaxmaml.data.classes import class_list

NUM_IMAGES = 4


@pytest.fixture(scope="module")
def synsets(tmp_path_factory):
    """A folder as miniImageNet's, with tiny images."""
    folder = tmp_path_factory.mktemp("archive")
    rng = np.random.default_rng(0)
    for name in (name for listed in class_list("mini_imagenet").values() for name in listed):
        (folder / name).mkdir()
        for number in range(NUM_IMAGES):
            pixels = rng.integers(0, 256, (5, 7, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, synsets):
    """A TFDS directory with miniImageNet of these images."""
    directory = tmp_path_factory.mktemp("tfds")
    prepare.prepare("mini-imagenet", directory, synsets)
    return directory


@pytest.fixture
def copied(prepared, tmp_path, monkeypatch):
    """A copy to damage, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shutil.copytree(prepared, tmp_path / "tfds")


def shard(data_dir, split="train"):
    (found,) = (data_dir / "mini_imagenet" / "1.0.0").glob(f"*-{split}.array_record*")
    return found


def test_mini_imagenet_has_the_published_classes_and_every_image(copied, synsets):
    opened = sources.images("mini-imagenet", copied, image_size=6, cache=False)
    assert {part: list(found.names) for part, found in opened.items()} == class_list(
        "mini_imagenet"
    )
    for found in opened.values():
        assert (found.sizes == NUM_IMAGES).all()
        assert found.shape == (6, 6, 3)
    train = opened["train"]
    first = Image.open(synsets / train.names[0] / "0.png").resize((6, 6), Image.Resampling.BILINEAR)
    rows = train.read(np.arange(NUM_IMAGES))
    assert (rows == np.asarray(first)).all((1, 2, 3)).any()


def test_labels_are_read_once_and_then_cached(copied, monkeypatch):
    found = records.TFDSRecords("mini_imagenet", copied)
    labels = found.labels()
    assert np.bincount(labels).tolist() == [NUM_IMAGES] * 100
    again = records.TFDSRecords("mini_imagenet", copied)
    monkeypatch.setattr(again, "_read_labels", lambda: pytest.fail("read again"))
    np.testing.assert_array_equal(again.labels(), labels)


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "of another set"])
def test_a_damaged_index_is_read_again(damage, copied):
    found = records.TFDSRecords("mini_imagenet", copied)
    labels = found.labels()
    path = index.index_path(found)
    whole = path.read_bytes()
    damaged = {"empty": b"", "cut": whole[:-40]}.get(damage)
    if damage == "flipped":
        where = whole.index(labels.tobytes()[:64])
        damaged = whole[:where] + bytes([whole[where] ^ 1]) + whole[where + 1 :]
    if damaged is None:
        np.savez(path, labels=labels[:5], checksum=0)
    else:
        path.write_bytes(damaged)
    np.testing.assert_array_equal(found.labels(), labels)
    assert path.read_bytes() == whole


def test_a_set_that_is_prepared_anew_has_another_index(copied):
    before = index.index_path(records.TFDSRecords("mini_imagenet", copied))
    shard(copied).touch()
    assert index.index_path(records.TFDSRecords("mini_imagenet", copied)) != before


def test_a_truncated_file_is_named(copied):
    path = shard(copied)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"mini_imagenet.*cannot be read"):
        sources.images("mini-imagenet", copied, cache=False)


def test_a_corrupted_record_is_named(copied):
    stored = sources.images("mini-imagenet", copied, image_size=6, cache=False)["train"]
    path = shard(copied)
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    (used,) = np.nonzero(content)  # the rest is padding
    content[used[len(used) // 2] :][:200] = 0
    path.write_bytes(content.tobytes())
    with pytest.raises(ValueError, match=rf"{path.name} record \d+.* cannot be (read|decoded)"):
        stored.read(np.arange(len(stored.numbers)))


def test_records_are_numbered_through_splits(copied):
    found = records.TFDSRecords("mini_imagenet", copied, ("train", "test"))
    assert found.where(0).endswith("record 0")
    assert "-train." in found.where(64 * NUM_IMAGES - 1)
    assert found.where(64 * NUM_IMAGES).endswith("record 0")
    assert "-test." in found.where(64 * NUM_IMAGES)
    mixed = [64 * NUM_IMAGES + 1, 3, 64 * NUM_IMAGES, 2]
    assert found.encoded(mixed) == [found.encoded([number])[0] for number in mixed]


def test_any_set_of_tfds_with_a_split_file(copied, tmp_path):
    path = tmp_path / "split.json"
    names = sources.class_names("mini_imagenet", copied)
    classes.write(path, classes.draw(names, (0.5, 0.25, 0.25), 3), seed=3)
    opened = sources.images("tfds:mini_imagenet", copied, str(path), 6, cache=False)
    assert {part: len(found.names) for part, found in opened.items()} == {
        "train": 50,
        "val": 25,
        "test": 25,
    }
    with pytest.raises(ValueError, match="a split is drawn once"):
        classes.write(path, {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "split.json cannot be read: No such file"),
        ("{", "split.json is no JSON"),
        ('{"train": ["a"], "val": ["b"]}', "must give a list of class names for 'test'"),
        ('{"train": [1], "val": ["b"], "test": ["c"]}', "for 'train'"),
        ('{"train": ["n01532829"], "val": ["nobody"], "test": ["n01558993"]}', "'nobody'; it has"),
        (
            '{"train": ["n01532829"], "val": ["n01532829"], "test": ["n01558993"]}',
            "'n01532829' is both in split 'train' and in 'val'",
        ),
    ],
)
def test_a_wrong_split_file_is_refused(content, message, copied, tmp_path):
    path = tmp_path / "split.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        sources.images("tfds:mini_imagenet", copied, str(path), cache=False)


def test_own_data_needs_a_split_file(copied, tmp_path):
    with pytest.raises(ValueError, match="needs a split file"):
        sources.images("tfds:mini_imagenet", copied)
    with pytest.raises(ValueError, match="does not exist"):
        sources.images(f"folder:{tmp_path / 'nowhere'}", split="x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="must hold a folder of images"):
        sources.images(f"folder:{tmp_path / 'empty'}", split="x")


@pytest.mark.parametrize(
    "fractions", [(0.5, 0.5), (0.5, 0.5, 0.5), (1.0, 0.0, 0.0), (0.98, 0.01, 0.01)]
)
def test_fractions_that_divide_nothing_are_refused(fractions):
    with pytest.raises(ValueError, match="fractions"):
        classes.draw("abcdefghij", fractions, 0)


def test_a_set_without_a_label_is_refused(copied):
    path = copied / "mini_imagenet" / "1.0.0" / "features.json"
    features = json.loads(path.read_text())
    label = features["featuresDict"]["features"].pop("label")
    features["featuresDict"]["features"]["kind"] = label
    path.write_text(json.dumps(features))
    with pytest.raises(ValueError, match=r"must have an integer feature 'label'.*kind"):
        records.TFDSRecords("mini_imagenet", copied)


def test_the_listing(copied):
    (found,) = prepare.listing(copied)
    assert found.name == "mini_imagenet"
    assert (found.num_classes, found.num_images) == (100, 100 * NUM_IMAGES)
    assert found.smallest[1] == NUM_IMAGES
    assert not found.problem


def test_preparing_again_does_nothing_and_an_incomplete_folder_is_refused(
    prepared, synsets, tmp_path
):
    assert prepare.prepare("mini-imagenet", prepared) == prepared / "mini_imagenet" / "1.0.0"
    with pytest.raises(ValueError, match="needs --archive-dir: a folder of images"):
        prepare.prepare("mini-imagenet", tmp_path)
    with pytest.raises(ValueError, match="is no directory"):
        prepare.prepare("mini-imagenet", tmp_path, tmp_path / "nowhere")
    (tmp_path / "n01532829").mkdir()
    with pytest.raises(ValueError, match="99 are missing"):
        prepare.prepare("mini-imagenet", tmp_path, tmp_path)
    assert not list(tmp_path.glob("mini_imagenet/1.0.0"))


def test_without_a_network_preparing_fails_soon(monkeypatch):
    def unreachable(*_, **__):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"has to be downloaded from example\.org, which cannot"):
        prepare._check_network("example.org", "omniglot")
    assert time.perf_counter() - start < 10


def test_a_network_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: threading.Event().wait())
    monkeypatch.setattr(prepare, "CONNECT_SECONDS", -2.9)
    with pytest.raises(ValueError, match="no answer"):
        prepare._check_network("example.org", "omniglot")


def test_preparing_stock_data_needs_tensorflow(monkeypatch, tmp_path):
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs TensorFlow: pip install 'jaxmaml\[prepare\]'"):
        prepare.prepare("omniglot", tmp_path)


def test_a_file_is_atomic_write_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file"
    with files.atomic_write(path) as file:
        file.write(b"one")
    with pytest.raises(AttributeError), files.atomic_write(path) as file:
        file.no_such_method()  # pyright: ignore[reportAttributeAccessIssue]
    assert path.read_bytes() == b"one"
    assert [found.name for found in path.parent.iterdir()] == ["file"]
