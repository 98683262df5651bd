"""Datasets by name: Omniglot as the papers use it, data of the user, and what is refused."""

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxmaml.data import class_splits, datasets, pools
from jaxmaml.data.records import TFDSRecords


@pytest.fixture(scope="module")
def finn(test_data):
    return datasets.load("omniglot", test_data)


def test_omniglot_finn(finn):
    assert {split: len(pool.names) for split, pool in finn.items()} == {
        "train": 1100,
        "val": 100,
        "test": 423,
    }
    for split, pool in finn.items():
        assert list(pool.names) == class_splits.published("omniglot_finn")[split]
        assert pool.images.shape == (20 * len(pool.names), 28, 28, 1)
        assert (pool.sizes == 20).all()


def test_omniglot_is_binary_with_ink_one(finn):
    for pool in finn.values():
        images = np.asarray(pool.images)
        assert set(np.unique(images)) == {0, 255}
        assert 0.02 < (images == 255).mean() < 0.2


def test_omniglot_matches_what_tfds_decodes(finn, test_data):
    import tensorflow_datasets as tfds
    from PIL import Image

    source: Any = tfds.data_source("omniglot", split="test", data_dir=test_data, download=False)
    names = source.dataset_info.features["label"].names
    where = {name: (pool, i) for pool in finn.values() for i, name in enumerate(pool.names)}
    for row in (source[i] for i in range(0, 13180, 1318)):
        ink = Image.fromarray(np.where(row["image"][..., 0] > 0, 0, 255).astype(np.uint8))
        expected = np.asarray(ink.resize((28, 28), Image.Resampling.NEAREST))
        pool, i = where[names[row["label"]]]
        images = np.asarray(pool.images)[int(pool.starts[i]) :][:20, :, :, 0]
        assert (images == expected).all((1, 2)).any()


def test_sampled_omniglot_classes_stay_in_their_split(finn):
    seen = {}
    for split, pool in finn.items():
        sample = pools.sampler(pool, num_tasks=200, way=5, shot=1, query=1, rotate=False)
        tasks = jax.jit(sample)(jax.random.key(0))
        inputs = np.rint(np.concatenate([b["inputs"] for b in tasks], 1) * 255).astype(np.uint8)
        seen[split] = {image.tobytes() for image in inputs.reshape(-1, 28 * 28)}
        assert seen[split] <= {image.tobytes() for image in np.asarray(pool.images)}
        assert len(seen[split]) > 1000
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["val"]
    assert not seen["val"] & seen["test"]


def test_omniglot_vinyals_and_image_size(test_data):
    read = datasets.images("omniglot", test_data, "vinyals", image_size=14, cache=False)
    sizes = {split: int(images.sizes.sum()) for split, images in read.items()}
    assert sizes == {"train": 20560, "val": 3440, "test": 8460}
    assert read["train"].read(np.arange(20559, 20550, -1)).shape == (9, 14, 14, 1)
    assert "Angelic_0" in {name for images in read.values() for name in images.names}


def test_unknown_class_splits_and_datasets_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="split='random' is unknown; choose one of finn, vinyals, or a fi"
    ):
        datasets.load("omniglot", tmp_path, "random")
    with pytest.raises(ValueError, match="split='finn' is unknown; choose one of script"):
        datasets.load("glyphs", tmp_path, "finn")
    with pytest.raises(ValueError, match="dataset='mnist' is unknown; choose one of glyphs, omni"):
        datasets.load("mnist", tmp_path)
    with pytest.raises(ValueError, match="image_size must be an integer, 1 or more; got 0"):
        datasets.load("omniglot", tmp_path, image_size=0)


def test_a_directory_without_omniglot_is_refused_at_once(tmp_path):
    command = f"jaxmaml data prepare omniglot --data-dir {tmp_path}"
    start = time.perf_counter()
    with pytest.raises(ValueError, match="must hold omniglot") as error:
        datasets.load("omniglot", tmp_path)
    assert time.perf_counter() - start < 5
    assert command in str(error.value)


def test_omniglot_in_another_format_is_refused(tmp_path):
    directory = tmp_path / "omniglot" / "3.0.0"
    directory.mkdir(parents=True)
    (directory / "dataset_info.json").write_text('{"fileFormat": "tfrecord"}')
    with pytest.raises(ValueError, match="only in another format than ArrayRecord"):
        datasets.load("omniglot", tmp_path)


def test_omniglot_without_a_directory_looks_where_tfds_does(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=f"data_dir='{tmp_path}' must hold omniglot"):
        datasets.load("omniglot")


def test_glyphs_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="glyphs cannot be written there"):
        datasets.load("glyphs", tmp_path / "file")


def test_glyphs_are_prepared_once_in_the_users_cache_directory(tmp_path, monkeypatch):
    import platformdirs

    from jaxmaml.data.builders import glyphs

    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr(glyphs, "NUM_DRAWINGS", 1)  # which takes a moment
    assert set(datasets.load("glyphs")) == {"train", "val", "test"}
    prepared = tmp_path / "jaxmaml" / "tfds" / "glyphs" / "1.0.0" / "dataset_info.json"
    written = prepared.stat().st_mtime_ns
    datasets.load("glyphs", class_split="script")
    names = datasets.class_names("glyphs")
    assert len(names) == 559
    assert prepared.stat().st_mtime_ns == written

    # A known dataset takes a file of another class split, too.
    own = {"train": list(names[:3]), "val": list(names[3:4]), "test": list(names[4:6])}
    class_splits.write(tmp_path / "own.json", own)
    found = datasets.images("glyphs", class_split=str(tmp_path / "own.json"), cache=False)
    assert {split: list(images.names) for split, images in found.items()} == own


def test_a_missing_split_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"split file .*gone\.json cannot be read: No such file"):
        datasets.load("omniglot", tmp_path, str(tmp_path / "gone.json"))


def test_a_folder_without_its_prefix_is_told_from_an_unknown_dataset(folder):
    message = f"{str(folder.path)!r} is a folder; its images are the dataset 'folder:{folder.path}'"
    for read in (datasets.class_names, datasets.images, datasets.scaling):
        with pytest.raises(ValueError, match=message):
            read(str(folder.path))


def test_any_dataset_of_tfds_with_a_split_file(copied, tmp_path):
    path = tmp_path / "split.json"
    names = datasets.class_names("mini_imagenet", copied)
    class_split = class_splits.draw(names, (0.5, 0.25, 0.25), 3)
    class_splits.write(path, class_split, seed=3)
    opened = datasets.images("tfds:mini_imagenet", copied, str(path), 6, cache=False)
    assert {split: list(found.names) for split, found in opened.items()} == class_split
    assert opened["train"].shape == (6, 6, 3)


def test_images_that_omniglot_repeats_are_not_read_twice(test_data):
    own = datasets._own_records("tfds:omniglot", test_data)
    assert isinstance(own, TFDSRecords)
    assert own.tfds_splits == ("train", "test")
    assert len(own) == 32_460


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train": ["n01532829"], "val": ["nobody"], "test": ["n01558993"]}', "'nobody'; it has"),
        (
            '{"train": ["n01532829"], "val": ["n01532829"], "test": ["n01558993"]}',
            "'n01532829' is in split 'train' and in split 'val'",
        ),
    ],
)
def test_a_split_file_that_does_not_suit_the_dataset_is_refused(content, message, copied, tmp_path):
    path = tmp_path / "split.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        datasets.images("tfds:mini_imagenet", copied, str(path), cache=False)


def test_data_of_the_user_needs_a_split_file(copied, tmp_path):
    with pytest.raises(ValueError, match="needs a split file"):
        datasets.images("tfds:mini_imagenet", copied)
    with pytest.raises(ValueError, match=r"needs a split file.*; there is no file 'script', and"):
        datasets.images("tfds:mini_imagenet", copied, "script")
    with pytest.raises(ValueError, match="does not exist"):
        datasets.images(f"folder:{tmp_path / 'nowhere'}", class_split="x")


def test_the_scaling_is_that_of_the_dataset():
    assert datasets.scaling("cub") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert datasets.scaling("omniglot") == ((0.0,), (1.0,))
    assert datasets.scaling("folder:x") == datasets.scaling("tfds:x") == ((0.5,), (0.5,))
    with pytest.raises(ValueError, match="dataset='mnist' is unknown"):
        datasets.scaling("mnist")


def test_the_data_directory_defaults_to_that_of_tfds(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert datasets.data_directory(None) == tmp_path
    assert datasets.data_directory("elsewhere").name == "elsewhere"
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert datasets.data_directory(None) == tmp_path / "home" / "tensorflow_datasets"


def test_classes_may_be_given_by_name():
    given = {"train": ["DIGIT ONE"], "val": ["DIGIT TWO"], "test": ["DIGIT SIX", "DIGIT SEVEN"]}
    found = datasets.images("glyphs", class_split=given, cache=False)
    assert {split: list(images.names) for split, images in found.items()} == given


def test_every_class_split_of_every_dataset_is_in_the_package_and_no_other():
    used = {
        str(datasets._known_class_split(name, split))
        for name, dataset in datasets.DATASETS.items()
        for split in dataset.class_splits
    }
    files = (Path(class_splits.__file__).parent / "splits").glob("*.json")
    assert len(used) == len(list(files))
