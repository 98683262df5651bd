"""Files appear whole or not at all, with the permissions that the user's files have."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jaxmaml import files


def test_a_file_appears_when_its_block_ends(tmp_path):
    path = tmp_path / "new" / "x.bin"
    with files.atomic_write(path) as file:
        file.write(b"abc")
        assert not path.exists()
    assert path.read_bytes() == b"abc"
    assert os.listdir(path.parent) == ["x.bin"]


def test_an_interruption_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")

    def interrupted():
        with files.atomic_write(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.bin"]


def test_a_file_has_the_permissions_of_the_umask(tmp_path):
    (tmp_path / "plain").touch()
    with files.atomic_write(tmp_path / "atomic") as file:
        file.write(b"")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic")}
    assert len(modes) == 1


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()

    def write():
        with files.atomic_write(tmp_path / "file" / "x"):
            pass

    with pytest.raises(files.WriteError, match="file/x cannot be written"):
        write()


def test_a_fingerprint_changes_with_name_size_and_time(tmp_path):
    path = tmp_path / "a"
    path.write_text("one")
    found = {files.fingerprint(tmp_path, [path])}
    path.write_text("three")
    found.add(files.fingerprint(tmp_path, [path]))
    os.utime(path, ns=(0, 0))
    found.add(files.fingerprint(tmp_path, [path]))
    found.add(files.fingerprint(tmp_path, [path.rename(tmp_path / "b")]))
    assert len(found) == 4
    assert files.fingerprint(tmp_path, [tmp_path / "b"]) in found


def write_at_time_zero(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    os.utime(path, ns=(0, 0))
    return path


def test_a_fingerprint_changes_when_folders_with_equal_names_sizes_and_times_change_places(
    tmp_path,
):
    paths = [write_at_time_zero(tmp_path / name / "0.png", name) for name in ("a", "b")]
    before = files.fingerprint(tmp_path, paths)
    assert files.fingerprint(tmp_path, paths[::-1]) == before
    (tmp_path / "a").rename(tmp_path / "c")
    (tmp_path / "b").rename(tmp_path / "a")
    (tmp_path / "c").rename(tmp_path / "b")
    assert files.fingerprint(tmp_path, paths) != before


def test_a_fingerprint_changes_when_a_file_is_written_again_with_equal_size_and_time(tmp_path):
    path = write_at_time_zero(tmp_path / "a" / "0.png", "one")
    before = files.fingerprint(tmp_path, [path])
    write_at_time_zero(path, "two")
    assert files.fingerprint(tmp_path, [path]) != before


def test_a_fingerprint_names_a_file_that_is_gone(tmp_path):
    with pytest.raises(ValueError, match="gone cannot be read"):
        files.fingerprint(tmp_path, [tmp_path / "gone"])


def test_arrays_are_mapped_by_many_threads_at_once(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(6).reshape(2, 3))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(files.map_array, [tmp_path / "a.npy"] * 400))
    assert all(array.shape == (2, 3) and array[1, 2] == 5 for array in found)
