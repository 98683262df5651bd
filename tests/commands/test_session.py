"""The settings of a process before a command computes."""

import os
import subprocess
import sys

import pytest

from jaxmaml.commands import session


@pytest.mark.parametrize(
    ("before", "version", "within"),
    [
        (None, (0, 10, 2), f"{session.PATIENCE}=3600"),
        ("--xla_a=1", (0, 12, 0), f"--xla_a=1 {session.PATIENCE}=3600"),
        (f"{session.PATIENCE}=7", (0, 10, 2), f"{session.PATIENCE}=7"),
        (None, (0, 13, 0), None),
    ],
)
def test_devices_wait_for_each_other(before, version, within, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if before is not None:
        monkeypatch.setenv("XLA_FLAGS", before)
    with session._patient_collectives(version):
        assert os.environ.get("XLA_FLAGS") == within
    assert os.environ.get("XLA_FLAGS") == before


def test_this_jaxlib_has_the_flag():
    """XLA ends a process at a flag that it does not know."""
    program = "import jax; jax.devices(); print(jax.numpy.ones(2).sum())"
    environment = os.environ | {"XLA_FLAGS": f"{session.PATIENCE}=3600"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "2.0\n"
