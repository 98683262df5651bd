"""`jaxmaml train --distributed` in several processes: the same run as one, and its ends."""

import json
import re
import signal
import time

import numpy as np
import pytest
from test_processes import free_port, nothing_is_left_running, start  # noqa: F401

COMMAND = (
    "train", "sinusoid-5shot", "--num-test-tasks", 30, "--devices", 1, "--hidden-sizes", 8,
    "--checkpoint-every", 50, "--num-validations", 2, "--num-val-tasks", 20,
)  # fmt: skip
SECONDS = 200


def _start(out, process, coordinator, *more, num_processes=2, steps=200):
    joined = ("--distributed", "--coordinator", coordinator, "--num-processes", num_processes)
    return start(
        ["-m", "jaxmaml"], *COMMAND, "--num-outer-steps", steps, "--out", out, *joined,
        "--process-id", process, *more,
    )  # fmt: skip


def _pair(out, *more, **options):
    coordinator = f"localhost:{free_port()}"
    return [_start(out, process, coordinator, *more, **options) for process in range(2)]


def _ended(process):
    """Returns (exit code, standard output, standard error) of a process that ends in time."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    except BaseException:
        process.kill()
        raise
    return process.returncode, out, err


def _wait_for_checkpoint(out, processes):
    end = time.monotonic() + SECONDS
    while not any((out / "training").glob("*/0*")):
        assert time.monotonic() < end, "no checkpoint"
        assert all(process.poll() is None for process in processes), [
            p.communicate() for p in processes
        ]
        time.sleep(0.1)


def _scores(out):
    return json.loads((out / "results.json").read_text())["runs"]["exact"]["mse_per_step"]


def test_two_processes_write_the_run_that_one_writes_and_only_the_first_speaks(tmp_path):
    first, second = _pair(tmp_path / "two")
    code, out, err = _ended(first)
    assert code == 0, err
    assert out.count("written to") == 1
    assert _ended(second) == (0, "", "")
    alone = start(["-m", "jaxmaml"], *COMMAND, "--num-outer-steps", 200, "--out", tmp_path / "one")
    assert _ended(alone)[0] == 0
    np.testing.assert_allclose(_scores(tmp_path / "two"), _scores(tmp_path / "one"), rtol=1e-3)
    rows = (tmp_path / "two/metrics.jsonl").read_text().splitlines()
    labels = [json.loads(row)["step"] for row in rows]
    assert sorted(set(labels)) == list(range(201))


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_to_one_process_ends_both_at_one_checkpoint(tmp_path, asked):
    out = tmp_path / "run"
    started = _pair(out, steps=100_000)
    _wait_for_checkpoint(out, started)
    started[asked].send_signal(signal.SIGTERM)
    for process in started:
        code, _, err = _ended(process)
        assert (code, err.splitlines()[-1]) == (143, "interrupted")
    # One process goes on with what two saved.
    (newest,) = sorted((out / "training" / "exact").iterdir())[-1:]
    step = int(newest.name[:9])
    alone = start(
        ["-m", "jaxmaml"], *COMMAND, "--num-outer-steps", 100_000, "--out", out, "--devices", 2
    )
    assert alone.stderr is not None
    while f"continues from outer step {step:,} of" not in (line := alone.stderr.readline()):
        assert line, "it did not continue"


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_ends_the_other_with_a_sentence(tmp_path, killed):
    out = tmp_path / "run"
    started = _pair(out, steps=100_000)
    _wait_for_checkpoint(out, started)
    started[killed].kill()
    begin = time.monotonic()
    code, _, err = _ended(started[1 - killed])
    assert time.monotonic() - begin < 60
    assert code not in (0, 2)
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "another process of this command ended or cannot be reached" in errors[0]
    assert "Traceback" not in err
    assert not re.search("coordination_service|@  ", err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([("--inner-lr", 0.1), ()], "have other settings, and must have the same: inner_lr is 0.1"),
        pytest.param(
            [("--mesh", "tasks=4")] * 2,
            "a mesh of tasks=4 and model=1 needs 4 devices; there are 2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_one_process_refuses_all_refuse(tmp_path, options, message):
    coordinator = f"localhost:{free_port()}"
    started = [_start(tmp_path / "run", i, coordinator, *more) for i, more in enumerate(options)]
    ended = [_ended(process) for process in started]
    assert [code for code, _, _ in ended] == [2, 2]
    assert all(err.count("error:") == 1 for _, _, err in ended)
    assert any(message in err for _, _, err in ended)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_number_that_is_used_twice_is_said(tmp_path):
    coordinator = f"localhost:{free_port()}"
    started = [_start(tmp_path / "run", process, coordinator) for process in (0, 1, 1)]
    ended = [_ended(process) for process in started]
    assert all(code for code, _, _ in ended)
    assert "two processes have the same --process-id" in ended[0][2]
    assert "Traceback" not in ended[0][2]
