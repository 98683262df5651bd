"""The package `jaxmaml.data`: what it exports, and what it loads."""

import importlib
import subprocess
import sys

import pytest

import jaxmaml.data

EXPORTED = (
    "augmentation", "class_splits", "datasets", "episodes", "pools", "sinusoid", "stored_images",
    "stream", "variable",
)  # fmt: skip


@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_name_is_the_module(name):
    assert getattr(jaxmaml.data, name) is importlib.import_module(f"jaxmaml.data.{name}")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        jaxmaml.data.no_such_name  # noqa: B018


def test_grain_loads_with_the_first_use_of_streams():
    code = (
        "import sys, jaxmaml.data; assert 'grain' not in sys.modules; "
        "jaxmaml.data.stream; assert 'grain' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
