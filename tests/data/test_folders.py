"""Records of a folder: numbers, labels, what is skipped, and damage with its file."""

import pickle
import warnings

import numpy as np
import pytest
from PIL import Image

from jaxmaml.data.decoders import Decoder, Format
from jaxmaml.data.folders import FolderRecords, images_in


def test_a_folder_is_read_in_the_order_of_its_names(folder):
    records = FolderRecords(folder.path)
    assert records.class_names == ("class0", "class1", "class2", "class3")
    assert len(records) == 20
    assert np.bincount(records.labels()).tolist() == [5, 4, 6, 5]
    assert records.where(5) == str(folder.path / "class1" / "0.png")
    assert records.encoded([5]) == [(folder.path / "class1" / "0.png").read_bytes()]


def test_the_fingerprint_of_a_folder_changes_with_its_files(folder):
    before = FolderRecords(folder.path).fingerprint
    assert FolderRecords(folder.path).fingerprint == before
    (folder.path / "class0" / "0.png").write_bytes(b"other")
    assert FolderRecords(folder.path).fingerprint != before


def test_a_file_of_a_folder_that_cannot_be_read_is_named(folder):
    records = FolderRecords(folder.path)
    (folder.path / "class0" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"class0/0\.png cannot be read"):
        records.encoded([0])


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        FolderRecords(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="must hold one folder of images"):
        FolderRecords(tmp_path)


SKIPPED = (
    "class0/deep/er/0.png",
    "class0/scan.heic",
    "class1/dir.png/0.png",
    "class1/notes.txt",
    "empty",
    "only_nested/deep/0.png",
    "top.png",
)


def write_what_is_not_read(path):
    hidden = (".git/0.png", "class0/.thumbs/0.png", "class0/._0.png", "class0/.DS_Store", ".x.png")
    for name in (*SKIPPED, *hidden, "README.md", "split.json"):
        if name == "empty":
            (path / name).mkdir()
            continue
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2)).save(path / name, "PNG")


def test_what_is_not_read_is_listed_and_hidden_folders_are_not_classes(folder):
    write_what_is_not_read(folder.path)
    with pytest.warns(
        UserWarning, match=r"7 not read.*: class0/deep/er/0\.png, class0/scan"
    ) as found:
        records = FolderRecords(folder.path)
    assert len(found) == 1
    assert records.skipped == SKIPPED
    assert records.class_names == ("class0", "class1", "class2", "class3")
    assert len(records) == 20
    with warnings.catch_warnings():  # a worker process lists it no second time
        warnings.simplefilter("error")
        assert pickle.loads(pickle.dumps(records)).skipped == SKIPPED


def test_a_folder_without_images_lists_what_it_has(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.heic").write_bytes(b"")
    with pytest.raises(ValueError, match=r"it holds none: 1 not read, .*: cat/0\.heic"):
        FolderRecords(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "bmp", "gif", "webp", "tif", "TIFF"])
def test_every_kind_of_image_is_read(suffix, tmp_path):
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (4, 4), (200, 200, 200)).save(tmp_path / "cat" / f"0.{suffix}")
    pixels = Decoder(FolderRecords(tmp_path), Format(4)).read(np.array([0]))
    np.testing.assert_allclose(pixels, 200, atol=1)


def test_a_class_without_images_is_refused_where_every_class_counts(folder):
    assert len(FolderRecords(folder.path, every_class=True)) == 20
    (folder.path / ".hidden").mkdir()
    (folder.path / "class4").mkdir()
    with pytest.raises(ValueError, match="class4 of a class holds no images"):
        FolderRecords(folder.path, every_class=True)


def test_the_images_of_a_flat_folder_are_read_in_the_order_of_their_names(folder):
    found = images_in(folder.path / "class0")
    assert [file.name for file in found] == [f"{i}.png" for i in range(5)]
    assert images_in(found[3]) == [found[3]]
    (folder.path / "class0" / "deep").mkdir()
    (folder.path / "class0" / ".x.png").touch()
    with pytest.warns(UserWarning, match="1 not read, .*: deep"):
        assert images_in(folder.path / "class0") == found


def test_a_flat_folder_without_images_is_refused(folder):
    with pytest.raises(ValueError, match=r"must hold images .*; it holds none, and 4 not read"):
        images_in(folder.path)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        images_in(folder.path / "nowhere")
