"""The stages for accelerators: their mistakes, and every stage with few packages, on a CPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
STAGES = ("speed", "memory", "transformer", "reproduce", "check")
NEEDED = ("optax", "chex", "orbax-checkpoint", "matplotlib", "rich")
"""Packages that a machine with an accelerator and without a network has, beside jax and flax."""
IMAGE = ("3.12", "jax==0.11.*", "flax==0.12.*")
"""The versions of Python, jax and flax there. Where this Python is missing, ours has the newest."""
ABSENT = ("tensorflow_datasets", "grain", "tyro", "platformdirs", "torch")
OFFLINE = """
import socket

def refuse(*_):
    raise OSError("no network here")

socket.getaddrinfo = refuse
"""
"""Runs when Python starts."""


def _run(*arguments, python=sys.executable, platform="cpu", **environ):
    environ = os.environ | {"PYTHON": str(python), "JAXMAML_PLATFORM": platform} | environ
    command = [str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "platform", "message"),
    [
        ([], "cpu", "usage: "),
        (["OUT", "chekc"], "cpu", "unknown stage 'chekc'"),
        (["OUT", "check", "--fast"], "cpu", "unknown option '--fast'"),
        (["OUT", "check", "--data", "nowhere.npz"], "cpu", "--data nowhere.npz is not a file"),
        (["OUT", "check"], "gpu", "JAX finds cpu, not a gpu"),
    ],
)
def test_a_mistake_is_one_line(arguments, platform, message, tmp_path):
    out = tmp_path / "out"
    arguments = [out if word == "OUT" else word for word in arguments]
    ran = _run(*arguments, platform=platform, JAX_PLATFORMS="cpu")
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1
    assert message in ran.stderr
    assert not ran.stdout
    assert not out.exists()


def _starts(python):
    """Returns whether a Python is there; pyenv has names of some that are not."""
    return python and subprocess.run([python, "-c", ""], capture_output=True).returncode == 0


def _find_python(version):
    """Returns a Python of a version, or None."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    named = sorted(pyenv.glob(f"versions/{version}.*/bin/python"))
    found = [shutil.which(f"python{version}"), *map(str, named)]
    return next(filter(_starts, found), None)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Returns a Python that has only these packages and reaches no network."""
    directory = tmp_path_factory.mktemp("bare")
    version, *packages = IMAGE
    base = _find_python(version)
    packages = packages if base else ["jax", "flax"]
    subprocess.run([base or sys.executable, "-m", "venv", str(directory)], check=True)
    python = directory / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([*install, *packages, *NEEDED], check=True)
    (library,) = directory.glob("lib/*/site-packages")
    (library / "sitecustomize.py").write_text(OFFLINE)
    for name in ABSENT:
        found = subprocess.run([str(python), "-c", f"import {name}"], capture_output=True)
        assert found.returncode != 0, name
    return python


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_runs_there_and_measures_nothing_twice(stage, bare, tmp_path):
    quick = () if stage == "check" else ("--quick",)
    for _ in range(2):
        ran = _run(tmp_path, stage, *quick, python=bare)
        assert ran.returncode == 0, ran.stderr
    texts = [file.read_text() for file in tmp_path.glob("*.jsonl")]
    rows = [json.loads(line) for text in texts for line in text.splitlines()]
    assert rows
    assert all(row["quick"] for row in rows)
    times = ("command",)
    cases = [json.dumps({k: v for k, v in row.items() if k not in times}) for row in rows]
    assert len(set(cases)) == len(cases)


@pytest.mark.slow
def test_peers_without_pytorch_say_so(bare, tmp_path):
    ran = _run(tmp_path, "peers", "--quick", python=bare)
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1
    assert "PyTorch is not installed" in ran.stderr
