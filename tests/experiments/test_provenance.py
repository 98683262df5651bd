"""Provenance: the commit is that of the package, and of no other checkout around it."""

import shutil
import subprocess
from pathlib import Path

import jax
import pytest

import jaxmaml
from jaxmaml.experiments import provenance


def test_the_device_and_the_versions_are_those_of_this_process():
    assert provenance.device().startswith(f"cpu x {jax.device_count()}, ")
    assert provenance.versions()["jax"] == jax.__version__


def test_the_commit_is_that_of_the_checkout():
    if (
        shutil.which("git") is None
        or not Path(jaxmaml.__file__).parents[1].joinpath(".git").exists()
    ):
        pytest.skip("not a git checkout")
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=Path(jaxmaml.__file__).parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert provenance.commit() == found.stdout.strip()


def test_an_installed_package_inside_another_checkout_has_no_commit(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "jaxmaml"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(jaxmaml, "__file__", str(package / "__init__.py"))
    assert provenance.commit() is None
