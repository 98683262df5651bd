"""The parts of the installation, the caches, and the needs of a preset."""

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxmaml import files
from jaxmaml.data import datasets
from jaxmaml.experiments import provenance
from jaxmaml.experiments.presets import Preset

FURTHER = ("orbax-checkpoint", "tensorflow-datasets", "grain")
"""The packages beside those on which numbers depend."""
EXTRAS: dict[str, str] = {
    "brax": "brax", "gymnax": "gymnax", "tensorboard": "tensorboardX", "prepare": "tensorflow",
    "peers": "torch", "docs": "pdoc",
}  # fmt: skip
"""A module of each optional part of the package."""
SYNTHETIC = ("glyphs", "sinusoid")
"""The datasets that need no preparation."""


class Cache(NamedTuple):
    """A directory that commands fill by themselves, and that may be removed at any time.

    Attributes:
        name: what it holds.
        path: the directory, which may be missing.
        num_bytes: the size of its files.
    """

    name: str
    path: Path
    num_bytes: int


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that matter in a report of an error.

    >>> versions()["jaxmaml"] == importlib.metadata.version("jaxmaml")
    True
    """
    return provenance.versions() | {name: importlib.metadata.version(name) for name in FURTHER}


def extras() -> dict[str, bool]:
    """Returns whether each optional part is installed."""
    return {extra: _is_installed(module) for extra, module in EXTRAS.items()}


def devices() -> dict[str, str]:
    """Returns the devices of JAX with their memory, as texts."""
    return {str(device): _memory_text(device) for device in jax.devices()}


def caches() -> list[Cache]:
    """Returns the caches of the package, with their sizes."""
    names = {"images": "images", "compilation": "compiled programs", "tfds": "glyphs"}
    paths = {name: files.cache_dir() / name for name in names}
    if configured := jax.config.values["jax_compilation_cache_dir"]:
        paths["compilation"] = Path(configured)
    return [Cache(text, paths[name], _size(paths[name])) for name, text in names.items()]


def missing(preset: Preset, prepared: Collection[str]) -> str:
    """Returns the command that makes a preset ready, or the option that it needs; "" if it is ready.

    Args:
        preset: the settings.
        prepared: the names in TFDS of the datasets that can be read.

    >>> from jaxmaml.experiments import presets
    >>> missing(presets.get("omniglot-5w1s"), prepared=[])
    'jaxmaml data prepare omniglot'
    """
    if preset.domain == "reinforcement":
        needs_brax = preset.dataset.startswith("cheetah") and not _is_installed("brax")
        return "pip install 'jaxmaml[brax]'" if needs_brax else ""
    if preset.dataset == "folder:":
        return "--dataset folder:PATH"
    if preset.dataset in SYNTHETIC or preset.dataset not in datasets.DATASETS:
        return ""
    is_there = datasets.DATASETS[preset.dataset].tfds in prepared
    return "" if is_there else f"jaxmaml data prepare {preset.dataset}"


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _memory_text(device: Any) -> str:
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return device.device_kind + (f", {limit / 2**30:.1f} GiB" if limit else "")


def _size(path: Path) -> int:
    """Returns the bytes of the files below a path; another process may remove some meanwhile."""
    total = 0
    for found in path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += found.stat().st_size if found.is_file() else 0
    return total
