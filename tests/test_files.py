"""Files appear whole or not at all, and a fingerprint changes with any of them."""

import os
import stat

import pytest

from jaxmaml import files


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file"
    with files.atomic_write(path) as file:
        file.write(b"one")
    with pytest.raises(AttributeError), files.atomic_write(path) as file:
        file.no_such_method()  # pyright: ignore[reportAttributeAccessIssue]
    assert path.read_bytes() == b"one"
    assert [found.name for found in path.parent.iterdir()] == ["file"]


def test_a_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    with files.atomic_write(tmp_path / "atomic") as file:
        file.write(b"")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic")}
    assert len(modes) == 1


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with (
        pytest.raises(ValueError, match=r"file/inner cannot be written"),
        files.atomic_write(tmp_path / "file" / "inner"),
    ):
        pass


def test_a_fingerprint_changes_with_name_size_and_time(tmp_path):
    path = tmp_path / "a"
    path.write_text("one")
    found = {files.fingerprint([path])}
    path.write_text("three")
    found.add(files.fingerprint([path]))
    os.utime(path, ns=(0, 0))
    found.add(files.fingerprint([path]))
    found.add(files.fingerprint([path.rename(tmp_path / "b")]))
    assert len(found) == 4
    assert files.fingerprint([tmp_path / "b"]) in found
