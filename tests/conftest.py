"""Fixtures that several test modules use."""

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)  # so that sharding is tested everywhere


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 for one test: exactness is judged there, where rounding cannot hide an error."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The TFDS directory with prepared data sets that JAXMAML_TEST_DATA names."""
    path = os.environ.get("JAXMAML_TEST_DATA")
    if not path:
        pytest.skip("JAXMAML_TEST_DATA names no TFDS directory with prepared data sets")
    if not Path(path).is_dir():
        pytest.fail(f"JAXMAML_TEST_DATA names {path}, which is no directory")
    return Path(path).resolve()
