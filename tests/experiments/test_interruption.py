"""A signal saves the training and ends the command; a second one ends it at once."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.tiny import OPTIONS
from jaxmaml import checkpoint
from jaxmaml.experiments.interruption import Interrupted, interruptible

STEPS = ["--num-outer-steps", "3000", "--checkpoint-every", "100"]
SINUSOID = ["train", "sinusoid-5shot", "--order", "first", *OPTIONS, *STEPS]
GLYPHS = [
    *("train", "glyphs-5w1s", "--model", "mlp", "--hidden-sizes", "4", "--num-tasks", "2"),
    *("--num-test-tasks", "5", "--num-val-tasks", "5", "--num-validations", "4", *STEPS),
    *("--selection-steps", "1", "3"),
]
STREAM = ["--stream", "--num-workers", "1", "--num-outer-steps", "300", "--checkpoint-every", "10"]
KILLED = {
    "sinusoid": SINUSOID,
    "device pool": GLYPHS,
    "stream with a worker": [*GLYPHS, *STREAM],
    "maml_plus_plus": [*GLYPHS, "--learner", "maml_plus_plus", "--norm", "per_step"],
    "compare": ["compare", *SINUSOID[1:2], *OPTIONS, *STEPS],
}
"""Trainings of a few seconds, one for each kind of source, state and command."""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_an_exception_with_its_exit_code(number, code):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught, interruptible():
        os.kill(os.getpid(), number)
    assert caught.value.code == code
    assert signal.getsignal(number) == before


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_runs_without_signals():
    done = []

    def run():
        with interruptible():
            done.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [True]


BUSY = """
import hashlib, time
from jaxmaml.experiments.interruption import interruptible
with interruptible():
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("first", flush=True)
        {wait}
"""


@pytest.mark.parametrize(
    "wait",
    [
        'hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # like a computation of XLA',
        "time.sleep(60)  # like Python, where the signal's handler runs",
    ],
)
def test_a_second_signal_ends_the_process_at_once(wait):
    command = [sys.executable, "-c", BUSY.format(wait=wait)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line, number in ((b"ready\n", signal.SIGINT), (b"first\n", signal.SIGTERM)):
            assert process.stdout.readline() == line
            process.send_signal(number)
        assert process.wait(timeout=20) == 143


def _wait_for(path, process):
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.01)


def _start(out, command=SINUSOID, *options, **popen):
    return subprocess.Popen(
        [sys.executable, "-m", "jaxmaml", *command, *options, "--out", str(out)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **popen,
    )  # fmt: skip


def _ended(out):
    """Returns the metrics, the scores, the files and the last checkpoints of a complete run."""
    runs = json.loads((out / "results.json").read_text())["runs"]
    times = ("seconds_per_outer_step", "compile_seconds")
    scores = {
        label: {name: value for name, value in run.items() if name not in times}
        for label, run in runs.items()
    }
    names = sorted(p.relative_to(out).as_posix() for p in out.iterdir())
    return (out / "metrics.jsonl").read_text(), scores, names, _states(out)


def _states(out):
    """Returns what each training saved last: its states, its validations and what it selected."""
    found = {}
    for label in (out / "training").iterdir():
        last = sorted(label.iterdir())[-1]
        arrays = ocp.StandardCheckpointHandler().restore(last)
        record = checkpoint.read_record(last)
        del record["record"]["seconds"]
        values = {name: np.asarray(value).tolist() for name, value in arrays.items()}
        found[label.name] = last.name[:9], values, record
    return found


def _running(session):
    """Returns the processes of a session that are not dead."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        if int(number) == session and state not in "ZX":
            found.append(int(path.parent.name))
    return found


def _num_steps(out):
    """Returns the steps that are saved, over all trainings of a directory."""
    newest = {}
    for path in sorted(out.glob("training/*/*")):
        step, _, number = path.name.partition("-")
        if step.isdecimal() and (not number or number.isdecimal()):  # not a partial one
            newest[path.parent] = int(step)
    return sum(newest.values())


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_saves_and_exits_within_seconds(number, code, tmp_path):
    out = tmp_path / "run"
    endless = ["--num-outer-steps", "1000000", "--checkpoint-every", "1000000"]
    with _start(out, SINUSOID, *endless) as process:
        _wait_for(out / "metrics.jsonl", process)
        time.sleep(1)
        process.send_signal(number)
        start = time.monotonic()
        _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert time.monotonic() - start < 15
    assert "continues this run" in said
    assert "Traceback" not in said
    (checkpoint,) = (out / "training" / "first").iterdir()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == list(range(int(checkpoint.name)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KILLED)
def test_a_run_that_is_killed_ten_times_ends_as_one_that_is_not(kind, tmp_path):
    with _start(tmp_path / "whole", KILLED[kind]) as process:
        assert process.wait() == 0
    out, randomness, resumed_at = tmp_path / "run", random.Random(0), []
    for _ in range(10):
        resumed_at.append(_num_steps(out))
        with _start(out, KILLED[kind]) as process:
            while _num_steps(out) == resumed_at[-1] and process.poll() is None:
                time.sleep(0.005)
            time.sleep(randomness.uniform(0, 0.3))
            process.kill()
    assert len(set(resumed_at)) == 10
    assert not (out / "results.json").exists()
    with _start(out, KILLED[kind]) as process:
        assert process.wait() == 0
    assert _ended(out) == _ended(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("num_workers", ["1", "2"])
def test_a_streaming_run_that_is_killed_leaves_no_process_and_no_plans_behind(
    num_workers, tmp_path
):
    out, temporary = tmp_path / "run", tmp_path / "temporary"
    temporary.mkdir()
    command = [*KILLED["stream with a worker"], "--num-workers", num_workers]
    environ = os.environ | {"TMPDIR": str(temporary)}
    with _start(out, command, env=environ, start_new_session=True) as process:
        while not _num_steps(out):
            assert process.poll() is None
            time.sleep(0.01)
        assert list(temporary.glob("jaxmaml-plans-*"))
        assert len(_running(process.pid)) > int(num_workers)
        process.kill()
        process.wait()
        end = time.monotonic() + 20  # it takes less than one; the machine may be busy
        while _running(process.pid) and time.monotonic() < end:
            time.sleep(0.1)
        left = _running(process.pid)
        for number in left:
            os.kill(number, signal.SIGKILL)
    assert not left
    assert not list(temporary.glob("jaxmaml-plans-*"))
