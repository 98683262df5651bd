"""The table of time to accuracy: what the clock counts, and that all sides train alike."""

import importlib
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed"
)

PEER = "torch.func vmap"


def test_the_clock_stands_still_between_its_blocks():
    clock = importlib.import_module("accuracy_child").Clock()
    with clock:
        pass
    counted = clock.seconds
    time.sleep(0.01)
    assert clock.seconds == counted < 0.3  # the pause before a block is not counted


def _row(side, number, seconds, steps=100):
    curve = [[50, seconds / 2, 0.5], [steps, seconds, 0.9]]
    return {
        "side": side, "round": number, "target": 0.9, "seconds": seconds, "steps": steps,
        "first_seconds": seconds / 2, "curve": curve,
    }  # fmt: skip


def test_the_ratio_is_the_median_over_rounds_in_which_both_got_there():
    summary = importlib.import_module("time_to_accuracy")._summary
    rows = [_row("jaxmaml", number, seconds) for number, seconds in enumerate([1.0, 2.0, 4.0])]
    rows += [_row(PEER, 0, 3.0), _row(PEER, 1, 8.0)]
    rows += [{"side": PEER, "round": 2, "seconds": None, "reason": "not reached in 100 steps"}]
    assert summary(PEER, rows)["ratio"] == 3.5
    missed = [{"side": PEER, "round": 0, "seconds": None, "reason": "why"}]
    assert summary(PEER, missed) == {"side": PEER, "reason": "why"}


@pytest.mark.slow
def test_sides_train_alike_in_processes_of_their_own(tmp_path):
    out = tmp_path / "rows.jsonl"
    command = [
        sys.executable,
        str(BENCHMARKS / "time_to_accuracy.py"),
        "--quick",
        "--out",
        str(out),
    ]
    command += ["--target", "1", "--every", "4", "--max-steps", "6", "--peer", PEER, "--resume"]
    for _ in range(2):  # the second time, everything is in the file
        subprocess.run(command, check=True, capture_output=True)
    ours, theirs = [json.loads(line) for line in out.read_text().splitlines()]
    assert (ours["side"], theirs["side"]) == ("jaxmaml", PEER)
    for row in (ours, theirs):
        assert row["reason"] == "not reached in 6 steps"
        assert row["seconds"] is None
        assert [steps for steps, _, _ in row["curve"]] == [4, 6]
    # A prediction on an edge may differ.
    for (_, _, accuracy), (_, _, expected) in zip(theirs["curve"], ours["curve"], strict=True):
        assert accuracy == pytest.approx(expected, abs=0.02)
