"""The measurements that the benchmarks share."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

common = importlib.import_module("common")


def test_sides_take_turns_after_one_call_each():
    calls = []
    sides = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = common.alternate(sides, 2)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert {name: len(found) for name, found in seconds.items()} == {"a": 2, "b": 2}


def test_ratio_is_the_median_of_pairs():
    seconds = {"a": [1.0, 9.0, 4.0], "b": [1.0, 3.0, 2.0]}
    assert common.median_ratio(seconds, "a", "b") == 2


def test_growth_is_per_step_and_unit_of_the_sides_that_are_left():
    before, after = {"exact": 100, "reverse": 100}, {"exact": 160}
    assert common.growth_per_step(before, after, num_steps=3, unit=10) == {"exact": 2}


def _options(out, *, resume=False):
    return argparse.Namespace(out=out, quick=True, resume=resume)


def test_a_check_is_not_written_to_the_results(capsys):
    with pytest.raises(SystemExit) as error:
        common.Rows(_options(common.RESULTS / "speed.jsonl"))
    assert error.value.code == 2
    assert "a check, not a measurement" in capsys.readouterr().err


def test_the_directory_of_a_new_file_is_made_before_anything_is_measured(tmp_path):
    out = tmp_path / "new" / "rows.jsonl"
    common.Rows(_options(out))
    assert out.read_text() == ""


def test_a_file_that_cannot_be_written_is_a_line_before_anything_is_measured(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        common.Rows(_options(tmp_path))
    assert error.value.code == 2
    assert capsys.readouterr().err == f"--out {tmp_path} cannot be written: Is a directory\n"


@pytest.mark.parametrize(
    ("file", "is_dirty"),
    [(None, False), ("benchmarks/results/rows.jsonl", False), ("benchmarks/speed.py", True)],
)
def test_a_row_is_called_dirty_if_more_than_results_changed(tmp_path, file, is_dirty):
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "rows.jsonl").touch()
    (tmp_path / "benchmarks" / "speed.py").touch()
    me = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    for command in (["init", "-q"], ["add", "-A"], [*me, "commit", "-qm", "all"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    if file is not None:
        (tmp_path / file).write_text("new")
    found = common.commit(tmp_path)
    assert found is not None
    assert found.endswith("-dirty") == is_dirty


def test_no_commit_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert common.commit(tmp_path) is None


def test_rows_are_appended_with_labels_and_environment(tmp_path):
    out = tmp_path / "rows.jsonl"
    for x, table in enumerate("ab"):
        common.Rows(_options(out), table=table).of({"work": "w"}, lambda x=x: {"x": x})
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["table"], row["work"], row["x"]) for row in rows] == [("a", "w", 0), ("b", "w", 1)]
    assert all({"quick", "commit", "versions", "device", "command"} <= set(row) for row in rows)


def test_a_case_that_the_file_holds_is_not_measured_again(tmp_path):
    out = tmp_path / "rows.jsonl"
    for number in range(2):
        rows = [{"x": number, "part": part} for part in "ab"]
        common.Rows(_options(out), table="t").of({"work": number}, lambda rows=rows: rows)
    with out.open("a") as file:
        file.write('{"table": "t", "work": 2, "x"')  # a process was killed
    table = common.Rows(_options(out, resume=True), table="t")
    held = table.of({"work": 1}, lambda: pytest.fail("measured again"))
    assert [(row["x"], row["part"]) for row in held] == [(1, "a"), (1, "b")]
    assert [row["x"] for row in table.of({"work": 2}, lambda: {"x": 7})] == [7]
    assert [row["x"] for row in common.Rows(_options(out)).of({"work": 1}, lambda: {"x": 8})] == [8]
    assert [json.loads(line)["x"] for line in out.read_text().splitlines()[5:]] == [7, 8]
