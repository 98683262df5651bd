"""Files appear whole or not at all, with the permissions that the user's files have."""

import contextlib
import os
import signal
import stat
import subprocess
import sys
import threading
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


def test_a_file_that_is_not_to_be_replaced_stays(tmp_path):
    path = tmp_path / "x"

    def write(*, meanwhile=False):
        with files.atomic_write(path, replace=False) as file:
            file.write(b"new")
            if meanwhile:
                path.write_bytes(b"another's")

    with pytest.raises(ValueError, match="x exists already"):
        write(meanwhile=True)
    with pytest.raises(ValueError, match="x exists already"):
        write()
    assert path.read_bytes() == b"another's"
    assert os.listdir(tmp_path) == ["x"]


def test_of_many_that_lock_at_once_one_succeeds(tmp_path):
    """The directory is removed after each try, as a start that fails removes it."""
    num_threads, num_rounds = 4, 50
    barrier, held = threading.Barrier(num_threads, timeout=30), []

    def work():
        counts, refusals = [], set()
        for _ in range(num_rounds):
            barrier.wait()
            try:
                with files.locked(tmp_path / "run" / ".lock"):
                    held.append(1)
                    counts.append(len(held))
                    held.pop()
            except ValueError as error:
                refusals.add(str(error))
            with contextlib.suppress(OSError):
                (tmp_path / "run").rmdir()
        return counts, refusals

    with ThreadPoolExecutor(num_threads) as pool:
        done = [pool.submit(work) for _ in range(num_threads)]
    counts = [count for work in done for count in work.result()[0]]
    assert len(counts) >= num_rounds
    assert set(counts) == {1}
    refusals = set().union(*(work.result()[1] for work in done))
    assert refusals <= {f"{tmp_path / 'run'} is in use by another process"}
    assert not list(tmp_path.iterdir())


LOCK_AND_DIE = """
import os, pathlib, signal, sys
from jaxmaml import files
with files.locked(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read(1)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_dead_process_holds_no_lock(tmp_path):
    command = [sys.executable, "-c", LOCK_AND_DIE, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(ValueError, match="in use"), files.locked(tmp_path / ".lock"):
            pass
        process.communicate(b"x")
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / ".lock").exists()
    with files.locked(tmp_path / ".lock"):
        pass
    assert not list(tmp_path.iterdir())


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
