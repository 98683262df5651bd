"""The image cache: whole or built again, another one for other files, nothing left by a failure."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jaxmaml.data import image_cache
from jaxmaml.data.image_cache import Cache
from jaxmaml.data.stored_images import InMemory

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 4, 5, 3), np.uint8)


def test_a_cache_returns_the_images_that_it_was_built_of(tmp_path):
    cache = Cache(tmp_path / "images.npy", 9, (4, 5, 3))
    assert not cache.is_whole()
    cache.build(InMemory(PIXELS))
    assert cache.is_whole()
    np.testing.assert_array_equal(cache.read(np.array([7, 0, 7])), PIXELS[[7, 0, 7]])
    assert not Cache(cache.path, 8, (4, 5, 3)).is_whole()
    assert not Cache(cache.path, 9, (5, 4, 3)).is_whole()


def test_a_damaged_cache_is_built_again(folder):
    expected = folder.open().read(np.arange(4))
    (cache,) = folder.cache.iterdir()
    for damage in (b"", cache.read_bytes()[:-1], b"not an array"):
        cache.write_bytes(damage)
        np.testing.assert_array_equal(folder.open().read(np.arange(4)), expected)


def test_a_changed_image_makes_another_cache(folder):
    before = folder.open().read(np.arange(5))
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder.path / "class0" / "0.png")
    after = folder.open().read(np.arange(5))
    assert before[0].any()
    assert not after[0].any()
    np.testing.assert_array_equal(after[1:], before[1:])


def test_an_image_that_cannot_be_decoded_is_named_and_no_cache_is_made(folder):
    (folder.path / "class1" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n not an image")
    with pytest.raises(ValueError, match=r"class1/2\.png: image cannot be decoded"):
        folder.open(cache=True)
    assert not list(folder.cache.iterdir())


def test_a_full_disk_leaves_nothing_behind(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match=r"images/.* cannot be written: .*No space left"):
        folder.open()
    assert not list(folder.cache.iterdir())


def test_images_are_read_without_a_cache_directory_that_can_be_written(folder, tmp_path):
    expected = folder.open(cache=False).read(np.arange(9))
    (tmp_path / "cache").write_text("a file")
    with pytest.warns(UserWarning, match="images are decoded each time they are used: .*cache"):
        found = folder.open()
    np.testing.assert_array_equal(found.read(np.arange(9)), expected)


def test_class_folders_that_change_places_are_decoded_again(folder):
    """The files have equal names, sizes and times; only their folders tell them apart."""
    for label, gray in (("class0", 50), ("class1", 200)):
        shutil.rmtree(folder.path / label)
        (folder.path / label).mkdir()
        path = folder.path / label / "0.bmp"
        Image.new("RGB", (9, 9), (gray,) * 3).save(path)
        os.utime(path, ns=(0, 0))
    assert folder.open().read([0, 1])[:, 0, 0, 0].tolist() == [50, 200]
    (folder.path / "class0").rename(folder.path / "other")
    (folder.path / "class1").rename(folder.path / "class0")
    (folder.path / "other").rename(folder.path / "class1")
    assert folder.open().read([0, 1])[:, 0, 0, 0].tolist() == [200, 50]


def test_images_that_were_decoded_by_other_rules_are_decoded_again(folder, monkeypatch):
    folder.open()
    monkeypatch.setattr(image_cache, "RULES", image_cache.RULES + 1)
    folder.open()
    assert len(list(folder.cache.iterdir())) == 2


def test_two_processes_may_build_one_cache_at_once(folder):
    code = (
        "import sys; from jaxmaml.data import datasets; "
        "train = datasets.images(f'folder:{sys.argv[1]}', None, sys.argv[2], 6)['train']; "
        "print(train.read([0, 1]).sum())"
    )
    command = [sys.executable, "-c", code, str(folder.path), str(folder.split)]
    programs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {program.communicate(timeout=60)[0].strip() for program in programs}
    assert printed == {str(folder.open(cache=False).read([0, 1]).sum())}
    assert len(list(folder.cache.iterdir())) == 1


def test_what_a_killed_process_left_is_removed_when_it_is_old(tmp_path):
    cache = Cache(tmp_path / "images.npy", 9, (4, 5, 3))
    old, new = (tmp_path / f".images.npy.{name}" for name in ("01234567", "89abcdef"))
    for partial in (old, new):
        partial.touch()
    os.utime(old, (0, 0))
    cache.build(InMemory(PIXELS))
    assert sorted(tmp_path.iterdir()) == [new, cache.path]
