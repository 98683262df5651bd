"""Fixtures that several test modules use."""

import gc
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Tests compile far more than they compute: less of LLVM's work makes the suite several times faster.
# What XLA itself does, which the guards on memory and operations look at, stays as it is.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

# A traced operation names the lines that made it: one of them, in place of a deep stack of pytest.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "1")

# What one worker has compiled, no other compiles again. The process that pytest was started as makes
# the directory and removes it; workers find its name in their environment.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _shared_cache = tempfile.TemporaryDirectory(prefix="jaxmaml-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _shared_cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    # And what the package keeps for a user is kept there too: prepared glyphs, indices, images.
    os.environ["XDG_CACHE_HOME"] = str(Path(_shared_cache.name, "user"))

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)  # so that sharding is tested everywhere

# The same examples in every run, however long one of them compiles; a test says only how many.
hypothesis.settings.register_profile(
    "jaxmaml",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("jaxmaml")


def pytest_configure() -> None:
    """Lets SIGINT interrupt, as in a terminal: a shell script ignores it in what it starts with `&`."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Lets the garbage collector run rarely: traced programs are many small objects that stay.

    At its default it took 4 of 50 s in a part of test_learners.py; so it takes less than 1.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves slow tests out, unless `-m`, `-k` or the name of a test chooses what runs."""
    chosen = config.option.markexpr or config.option.keyword
    if chosen or any("::" in argument for argument in config.args):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_module() -> Iterator[None]:
    """Drops the programs of the modules so far before there are too many for one process.

    A process may map 65,530 areas of memory. Each program maps some, and a whole suite would need
    more: XLA ended the process. The largest module needs about 9,000.
    """
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_text().count("\n") > 25_000:
        jax.clear_caches()


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
