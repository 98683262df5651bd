"""Data sets as pools: the class lists, Omniglot as the papers use it, and bad directories."""

import time
from typing import Any

import jax
import numpy as np
import pytest

from jaxmaml.data import classes, pools, sources

PARTS = {
    "cifar_fs": (64, 16, 20),
    "cub": (100, 50, 50),
    "fc100": (60, 20, 20),
    "glyphs": (229, 83, 247),
    "mini_imagenet": (64, 16, 20),
    "omniglot_finn": (1100, 100, 423),
    "omniglot_vinyals": (1028, 172, 423),
}


@pytest.fixture(scope="module")
def finn(test_data):
    return sources.load("omniglot", test_data)


@pytest.mark.parametrize("name", PARTS)
def test_class_lists_are_complete_and_disjoint(name):
    listed = classes.class_list(name)
    assert tuple(len(classes) for classes in listed.values()) == PARTS[name]
    everything = [c for classes in listed.values() for c in classes]
    assert len(set(everything)) == len(everything)


def test_the_finn_list_is_the_draw_that_it_states():
    listed = classes.class_list("omniglot_finn")
    names = sorted(name for part in listed.values() for name in part)
    order = np.random.RandomState(1).permutation(names).tolist()
    assert len(names) == 1623
    assert listed["train"] == sorted(order[:1100])
    assert listed["val"] == sorted(order[1100:1200])
    assert listed["test"] == sorted(order[1200:])


def test_both_omniglot_lists_name_the_same_characters():
    finn, vinyals = (classes.omniglot(split) for split in ("finn", "vinyals"))
    assert {n for part in finn.values() for n in part} == {
        n for part in vinyals.values() for n in part
    }


def test_omniglot_finn(finn):
    assert {split: len(pool.names) for split, pool in finn.items()} == {
        "train": 1100,
        "val": 100,
        "test": 423,
    }
    for split, pool in finn.items():
        assert list(pool.names) == classes.class_list("omniglot_finn")[split]
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
    read = sources.load("omniglot", test_data, "vinyals", image_size=14)
    assert {split: pool.images.shape for split, pool in read.items()} == {
        "train": (20560, 14, 14, 1),
        "val": (3440, 14, 14, 1),
        "test": (8460, 14, 14, 1),
    }
    assert "Angelic_0" in {name for pool in read.values() for name in pool.names}


def test_unknown_splits_and_data_sets(tmp_path):
    with pytest.raises(ValueError, match="split='random' is unknown; choose one of finn, vinyals"):
        sources.load("omniglot", tmp_path, "random")
    with pytest.raises(ValueError, match="split='finn' is unknown; choose one of script"):
        sources.load("glyphs", tmp_path, "finn")
    with pytest.raises(ValueError, match="dataset='mnist' is unknown; choose one of glyphs, omni"):
        sources.load("mnist", tmp_path)
    with pytest.raises(ValueError, match="image_size must be a positive integer, got 0"):
        sources.load("omniglot", tmp_path, image_size=0)


def test_a_directory_without_omniglot_is_refused_at_once(tmp_path):
    command = f"jaxmaml data prepare omniglot --data-dir {tmp_path}"
    start = time.perf_counter()
    with pytest.raises(ValueError, match="must hold omniglot") as error:
        sources.load("omniglot", tmp_path)
    assert time.perf_counter() - start < 5
    assert command in str(error.value)


def test_omniglot_in_another_format_is_refused(tmp_path):
    directory = tmp_path / "omniglot" / "3.0.0"
    directory.mkdir(parents=True)
    (directory / "dataset_info.json").write_text('{"fileFormat": "tfrecord"}')
    with pytest.raises(ValueError, match="only in another format than ArrayRecord"):
        sources.load("omniglot", tmp_path)


def test_omniglot_without_a_directory_looks_where_tfds_does(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=f"data_dir='{tmp_path}' must hold omniglot"):
        sources.load("omniglot")


def test_glyphs_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="glyphs cannot be written there"):
        sources.load("glyphs", tmp_path / "file")


def test_load_and_the_users_cache_directory(tmp_path, monkeypatch):
    import platformdirs

    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    assert set(sources.load("glyphs")) == {"train", "val", "test"}
    prepared = tmp_path / "jaxmaml" / "tfds" / "glyphs" / "1.0.0" / "dataset_info.json"
    written = prepared.stat().st_mtime_ns
    sources.load("glyphs", split="script")
    assert prepared.stat().st_mtime_ns == written
