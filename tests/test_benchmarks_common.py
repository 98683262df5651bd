"""The measurements that the benchmarks share."""

import importlib
import json
import sys
from pathlib import Path

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


def test_rows_are_appended_with_labels_and_environment(tmp_path):
    out = tmp_path / "rows.jsonl"
    common.emit([{"x": 1}], out, table="a")
    common.emit([{"x": 2}], out, table="b")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["table"], row["x"]) for row in rows] == [("a", 1), ("b", 2)]
    assert all({"commit", "versions", "device", "command"} <= set(row) for row in rows)
