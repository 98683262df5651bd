"""A finished run directory and an unfinished one."""

import shutil

import pytest


@pytest.fixture
def finished(compared, tmp_path):
    """A copy of the run directory of `compared`."""
    path = tmp_path / "finished"
    shutil.copytree(compared[0].run_dir.path, path)
    return path


@pytest.fixture
def unfinished(finished, tmp_path):
    """The directory of a process that was killed at outer step 3 of its first run."""
    path = tmp_path / "unfinished"
    shutil.copytree(finished, path)
    (path / "results.json").unlink()
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join(lines[:5]) + '{"label": "exact", "st')
    return path
