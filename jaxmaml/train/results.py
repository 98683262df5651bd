"""results.json, a stable interface, and config.json."""

import dataclasses
import pathlib
import platform
import subprocess
from importlib import metadata
from typing import Any

import jax

import jaxmaml
from jaxmaml.train.experiment import Spec
from jaxmaml.train.presets import Preset
from jaxmaml.train.training import Run

Gradient = dict[str, list[float]]
"""{"cosine", "norm_ratio", "step"}: first-order against exact meta-gradients along a run."""


def config(
    preset: Preset,
    specs: list[Spec],
    *,
    seed: int,
    num_test_tasks: int,
    data_dir: pathlib.Path | None,
    matmul_precision: str,
    input_shape: tuple[int, ...],
    num_classes: int,
) -> dict[str, Any]:
    """What config.json holds: all that is needed to run or evaluate again."""
    return {
        "preset": dataclasses.asdict(preset),
        "runs": [spec._asdict() for spec in specs],
        "seed": seed,
        "num_test_tasks": num_test_tasks,
        "data_dir": None if data_dir is None else str(data_dir.absolute()),
        "matmul_precision": matmul_precision,
        "input_shape": list(input_shape),
        "num_classes": num_classes,
        "versions": versions(),
        "commit": commit(),
    }


def preset_of(config: dict[str, Any]) -> Preset:
    """The preset that a config.json states."""
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in config["preset"].items()
    }
    return Preset(**fields)


def results(
    config: dict[str, Any], runs: list[Run], *, floor: float | None, gradient: Gradient | None
) -> dict[str, Any]:
    """What results.json holds."""
    preset = preset_of(config)
    return {
        "preset": preset.name,
        "seed": config["seed"],
        "num_test_tasks": config["num_test_tasks"],
        "device": device(),
        "versions": config["versions"],
        "commit": config["commit"],
        "matmul_precision": config["matmul_precision"],
        "compute_dtype": preset.compute_dtype,
        "floor": {"nearest_neighbour": floor},
        "runs": {run.spec.label: _run(preset, run) for run in runs},
        "gradient": gradient,
    }


def _run(preset: Preset, run: Run) -> dict[str, Any]:
    return {
        "mse_per_step" if preset.is_regression else "accuracy_per_step": run.test.mean,
        "ci95_per_step": run.test.ci95,
        "nearest_neighbour_on_features": run.on_features,
        "num_nonfinite": run.test.num_nonfinite,
        "seconds_per_outer_step": run.seconds_per_outer_step,
        "compile_seconds": run.compile_seconds,
        "temp_bytes": run.temp_bytes,
        "flops": run.flops,
        "num_outer_steps": run.num_outer_steps,
        "inner_lr": run.spec.inner_lr,
    }


def device() -> str:
    """Kind and number of the devices and the processor, as in "cpu x 2, x86_64"."""
    return f"{jax.devices()[0].device_kind} x {jax.device_count()}, {platform.machine()}"


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("jaxmaml", "jax", "jaxlib", "flax", "optax")
    return {name: metadata.version(name) for name in packages} | {
        "python": platform.python_version()
    }


def commit() -> str | None:
    """The git commit of the package's checkout; None where it is not run from one."""
    source = pathlib.Path(jaxmaml.__file__)
    # An environment inside another project's checkout would give that project's commit.
    if _git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        return None
    return _git(source.parent, "rev-parse", "HEAD")


def _git(directory: pathlib.Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
