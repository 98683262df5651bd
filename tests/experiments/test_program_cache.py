"""The second start of a command reads what the first compiled; the environment decides where."""

import json
import os
import subprocess
import sys

import jax
import pytest

from experiments.tiny import OPTIONS as TINY
from jaxmaml import files
from jaxmaml.experiments import program_cache

_OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """JAX's settings of the cache as they are in a new process, for one test."""
    before = {name: getattr(jax.config, name) for name in _OPTIONS}
    for name in _OPTIONS:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(files, "cache_dir", lambda: tmp_path)
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


def test_every_program_is_kept_in_the_cache_of_the_user(fresh):
    program_cache.use()
    assert [getattr(jax.config, name) for name in _OPTIONS] == [str(fresh / "compilation"), 0.0, -1]


@pytest.mark.parametrize("directory", ["elsewhere", ""], ids=["another directory", "no cache"])
def test_the_directory_that_is_chosen_stays(directory, fresh, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", directory)  # as JAX reads its environment
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1.0")
    program_cache.use()
    assert [getattr(jax.config, name) for name in _OPTIONS[:2]] == [directory, 1.0]


def test_what_was_not_used_for_the_longest_time_is_removed(tmp_path):
    (tmp_path / "autotuned").mkdir()
    names = ["c", "a", "autotuned/b", "d"]
    for age, name in enumerate(reversed(names)):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - 100))
    left = lambda: [name for name in names if (tmp_path / name).exists()]
    program_cache.remove_oldest(tmp_path, 40)
    assert left() == names
    program_cache.remove_oldest(tmp_path, 25)
    assert left() == ["autotuned/b", "d"]
    program_cache.remove_oldest(tmp_path / "missing", 25)


# Prints how often each command compiled a program, and how often it read one instead.
_CHILD = """
import json, sys
from collections import Counter
from jax import monitoring
from jaxmaml import cli

events = Counter()
monitoring.register_event_listener(lambda name, **_: events.update([name]))
monitoring.register_event_duration_secs_listener(lambda name, _, **__: events.update([name]))
counts = []
for words in json.loads(sys.argv[1]):
    events.clear()
    assert cli.main(words) == 0, words
    read = events["/jax/compilation_cache/cache_hits"]
    counts.append([words[0], events["/jax/core/compile/backend_compile_duration"] - read, read])
print(json.dumps(counts))
"""


def _start(commands, directory):
    """Runs commands in a new process as a user does: [[command, programs compiled, programs read]]."""
    environ = {name: value for name, value in os.environ.items() if name.lower() not in _OPTIONS}
    directory.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps(commands)],
        cwd=directory, env=environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_second_start_of_a_command_compiles_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    support, points = tmp_path / "support.csv", tmp_path / "points.csv"
    support.write_text("x,y\n0,0\n1,0.8\n2,0.9\n")
    points.write_text("x\n0.5\n")
    tiny = ["--model", "mlp", "--way", "3", *TINY[:6], "--num-test-tasks", "3"]
    tiny += ["--num-val-tasks", "2", "--num-validations", "1"]
    commands = [
        ["train", "sinusoid-5shot", "--out", "sines", *TINY],
        ["evaluate", "sines", "--num-test-tasks", "5"],
        ["adapt", "sines", "--support", str(support), "--points", str(points),
         "--export", "model"],
        ["compare", "glyphs-5w1s", "--out", "glyphs", "--num-seeds", "2", *tiny],
        ["evaluate", "glyphs", "--num-test-tasks", "3"],
        ["report", "sines", "glyphs"],
        ["data", "show", "glyphs-5w1s", "--way", "3"],
    ]  # fmt: skip
    first = _start(commands, tmp_path / "first")
    assert first[0][1] > 10
    second = _start(commands, tmp_path / "second")
    assert [(command, compiled) for command, compiled, _ in second] == [
        (words[0], 0) for words in commands
    ]
    assert second[0][2] > 10
    assert second[3][2] > 10
