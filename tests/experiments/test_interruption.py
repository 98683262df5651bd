"""A signal saves the training and ends the command; a second one ends it at once."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from experiments.tiny import OPTIONS
from jaxmaml.experiments.interruption import Interrupted, interruptible

STEPS = ["--num-outer-steps", "3000", "--checkpoint-every", "100"]
COMMAND = [
    *(sys.executable, "-m", "jaxmaml", "train", "sinusoid-5shot", "--order", "first"),
    *OPTIONS, *STEPS,
]  # fmt: skip


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
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # like a computation of XLA
"""


def test_a_second_signal_ends_the_process_while_the_main_thread_is_busy():
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line, number in ((b"ready\n", signal.SIGINT), (b"first\n", signal.SIGTERM)):
            assert process.stdout.readline() == line
            process.send_signal(number)
        assert process.wait(timeout=20) == 143


def _wait_for(path, process):
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.01)


def _start(out, *options):
    return subprocess.Popen(
        [*COMMAND, *options, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def _ended(out):
    """Returns the metrics, the scores and the files of a run that is complete."""
    results = json.loads((out / "results.json").read_text())["runs"]["first"]
    scores = {name: results[name] for name in ("mse_per_step", "ci95_per_step", "num_outer_steps")}
    names = sorted(p.relative_to(out).as_posix() for p in out.iterdir())
    last = sorted(path.name for path in (out / "training" / "first").iterdir())[-1]
    return (out / "metrics.jsonl").read_text(), scores, names, last[:9]


def _last_step(out):
    """Returns the step of the newest checkpoint of a training."""
    return max((int(path.name[:9]) for path in out.glob("training/first/?????????")), default=0)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_saves_and_exits_within_seconds(number, code, tmp_path):
    out = tmp_path / "run"
    endless = ["--num-outer-steps", "1000000", "--checkpoint-every", "1000000"]
    with _start(out, *endless) as process:
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
def test_a_run_that_is_killed_ten_times_ends_as_one_that_is_not(tmp_path):
    with _start(tmp_path / "whole") as process:
        assert process.wait() == 0
    out, randomness, resumed_at = tmp_path / "run", random.Random(0), []
    for _ in range(10):
        resumed_at.append(_last_step(out))
        with _start(out) as process:
            while _last_step(out) == resumed_at[-1] and process.poll() is None:
                time.sleep(0.005)
            time.sleep(randomness.uniform(0, 0.3))
            process.kill()
    assert len(set(resumed_at)) == 10
    assert not (out / "results.json").exists()
    with _start(out) as process:
        assert process.wait() == 0
    assert _ended(out) == _ended(tmp_path / "whole")
