"""Several processes: the same results as one, and what they tell each other."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_learners import ROWS

from jaxmaml import processes

TESTS = Path(__file__).resolve().parent
SECONDS = 300


def free_port():
    """Returns a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


_STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    """Ends the processes that a test has started, if it fails."""
    yield
    while _STARTED:
        process = _STARTED.pop()
        process.kill()
        process.communicate()


def start(script, *arguments):
    """Starts a Python process that sees the modules of this directory, without this one's devices."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", str(TESTS.parent))])
    environ = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, *script, *map(str, arguments)],
        env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    _STARTED.append(process)
    return process


def _made(tmp_path, num_processes, num_devices, names):
    """Returns what `joined.py` makes of some cases with that number of processes and devices each."""
    out, coordinator = tmp_path / f"{num_processes}x{num_devices}.npz", f"localhost:{free_port()}"
    started = [
        start([TESTS / "joined.py"], coordinator, num_processes, process, num_devices, out, *names)
        for process in range(num_processes)
    ]
    for process in started:
        _, errors = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, errors[-3000:]
    return dict(np.load(out))


def _assert_same(found, expected):
    """Float64 results are equal to 1e-11, by the norm over all leaves of a case."""
    assert found.keys() == expected.keys()
    for case in {name.partition("/")[0] for name in found}:
        first, second = _flat(found, case), _flat(expected, case)
        assert np.linalg.norm(first - second) <= 1e-11 * np.linalg.norm(second), case


def _flat(arrays, case):
    """Returns all numbers of a case."""
    leaves = [name for name in arrays if name.partition("/")[0] == case]
    return np.concatenate([np.ravel(arrays[name]) for name in leaves])


def test_two_processes_train_as_one_does(tmp_path):
    names = ["sinusoid", "stream", "split"]
    _assert_same(_made(tmp_path, 2, 2, names), _made(tmp_path, 1, 1, names))


@pytest.mark.slow
def test_two_processes_train_every_learner_as_one_does(tmp_path):
    names = ["pool", *ROWS]
    _assert_same(_made(tmp_path, 2, 1, names), _made(tmp_path, 1, 1, names))


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [2, 3, 4, 8])
def test_any_number_of_devices_trains_as_one_does(tmp_path, num_devices):
    names = ["sinusoid", "pool", "stream", "split", *ROWS]
    _assert_same(_made(tmp_path, 1, num_devices, names), _made(tmp_path, 1, 1, names))


def test_one_process_agrees_with_itself():
    assert processes.gathered({"step": 3}) == [{"step": 3}]
    assert processes.from_first(lambda: "made") == "made"
    with pytest.raises(OSError, match="no such disk"), processes.agreeing():
        raise OSError("no such disk")


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (("localhost:1234", None, 0), "num_processes must be given, too, or none of the three"),
        (("localhost", 2, 0), "coordinator must be host:port; got 'localhost'"),
        (("localhost:99999", 2, 1), "coordinator must be host:port"),
        (("localhost:1234", 0, 0), "num_processes must be an integer, 1 or more"),
        (("localhost:1234", 2, 2), "process_id must be 0 to num_processes - 1 = 1; got 2"),
        (("localhost:1234", 2, -1), "process_id must be an integer, 0 or more"),
    ],
)
def test_wrong_numbers_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        processes.initialize(*numbers)


def test_a_coordinator_that_cannot_be_reached_is_an_error_in_time():
    with pytest.raises(ConnectionError, match="cannot be reached within 1 s"):
        processes.initialize(f"localhost:{free_port()}", 2, 1, timeout=1)


def test_a_port_that_is_taken_is_an_error():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with pytest.raises(ConnectionError, match="another process 0 may run here"):
            processes.initialize(f"localhost:{taken.getsockname()[1]}", 2, 0)
    assert jax.process_count() == 1
