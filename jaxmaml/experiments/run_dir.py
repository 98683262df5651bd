"""The run directory: every file of it, its name, its contents, writing and reading.

A directory holds one or several runs::

    config.json        all that is needed to run or evaluate again, written first
    metrics.jsonl      one row per outer step and per validation of each run
    checkpoints/LABEL  the state of each run
    results.json       the scores and costs of each run, written last: a complete directory has it
    *.png              see `figures`

JSON holds null for a number that is not finite. Files are written whole or not at all, and never
over another run. The keys of results.json are a stable interface.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np

from jaxmaml import checkpoint
from jaxmaml.experiments import provenance
from jaxmaml.experiments.candidates import Spec
from jaxmaml.experiments.presets import Preset
from jaxmaml.experiments.run import Run
from jaxmaml.files import atomic_write
from jaxmaml.types import MetaState

Gradient: TypeAlias = dict[str, list[float]]
"""{"cosine", "norm_ratio", "step"}: first-order against exact meta-gradients along a run."""


@dataclasses.dataclass(frozen=True)
class RunDir:
    """A directory for the files of one or several runs.

    >>> RunDir(pathlib.Path("runs/a")).checkpoint("exact").as_posix()
    'runs/a/checkpoints/exact'
    """

    path: pathlib.Path

    @property
    def config(self) -> pathlib.Path:
        """The settings of the runs."""
        return self.path / "config.json"

    @property
    def results(self) -> pathlib.Path:
        """The scores and costs of the runs."""
        return self.path / "results.json"

    @property
    def metrics(self) -> pathlib.Path:
        """The metrics of every outer step and validation."""
        return self.path / "metrics.jsonl"

    def checkpoint(self, label: str) -> pathlib.Path:
        """Returns the directory of the state of a run."""
        return self.path / "checkpoints" / label

    def plot(self, name: str) -> pathlib.Path:
        """Returns the file of a plot."""
        return self.path / f"{name}.png"

    def check_vacant(self) -> None:
        """Raises ValueError if the path is a file, or a directory with another run."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--out {self.path} is a file: name a directory")
        found = [path.name for path in (self.config, self.results) if path.exists()]
        if found:
            raise ValueError(
                f"--out {self.path} holds another run ({found[0]}): name a new directory"
            )

    def create(self, config: dict[str, Any]) -> None:
        """Makes the directory, with its config.json.

        Raises:
            ValueError: it holds another run, or it cannot be written.
        """
        self.check_vacant()
        write_json(self.config, config)

    def append_metrics(self, rows: Iterable[dict[str, Any]]) -> None:
        """Appends rows to metrics.jsonl in a single write, so that no row is ever cut."""
        lines = "".join(json.dumps(to_json(row), allow_nan=False) + "\n" for row in rows)
        with self.metrics.open("ab", buffering=0) as file:
            file.write(lines.encode())

    def save_state(self, label: str, meta_state: MetaState) -> None:
        """Saves the state of a run."""
        checkpoint.save(self.checkpoint(label), meta_state)

    def restore_state(self, label: str, like: MetaState) -> MetaState:
        """Returns the state of a run, in the structure of `like`.

        Raises:
            ValueError: there is no such state, or it belongs to another model.
        """
        return checkpoint.restore(self.checkpoint(label), like)

    def read_config(self) -> dict[str, Any]:
        """Returns the contents of config.json.

        Raises:
            ValueError: the directory holds no readable run.
        """
        if not self.config.is_file():
            raise ValueError(
                f"RUN_DIR {self.path} holds no run (no config.json): name a directory that "
                "jaxmaml train or jaxmaml compare wrote"
            )
        try:
            return json.loads(self.config.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.config} is not JSON: {error}") from None


def make_config(
    preset: Preset,
    specs: Iterable[Spec],
    *,
    seed: int,
    num_test_tasks: int,
    data_dir: pathlib.Path | None,
    matmul_precision: str,
    input_shape: tuple[int, ...],
    num_classes: int,
) -> dict[str, Any]:
    """Returns the contents of config.json: all that is needed to run or evaluate again."""
    return {
        "preset": dataclasses.asdict(preset),
        "runs": [spec._asdict() for spec in specs],
        "seed": seed,
        "num_test_tasks": num_test_tasks,
        "data_dir": None if data_dir is None else str(data_dir.absolute()),
        "matmul_precision": matmul_precision,
        "input_shape": list(input_shape),
        "num_classes": num_classes,
        "versions": provenance.versions(),
        "commit": provenance.commit(),
    }


def preset_of(config: dict[str, Any]) -> Preset:
    """Returns the preset of a config.json."""
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in config["preset"].items()
    }
    return Preset(**fields)


def specs_of(config: dict[str, Any]) -> list[Spec]:
    """Returns the descriptions of the runs of a config.json."""
    return [Spec(**run) for run in config["runs"]]


def make_results(
    config: dict[str, Any],
    runs: Iterable[Run],
    *,
    floor: float | None,
    gradient: Gradient | None,
) -> dict[str, Any]:
    """Returns the contents of results.json.

    Args:
        config: the contents of config.json.
        runs: the runs.
        floor: accuracy of the nearest neighbor on pixels; None for regression.
        gradient: first-order against exact meta-gradients; None if they were not compared.
    """
    preset = preset_of(config)
    return {
        "preset": preset.name,
        "seed": config["seed"],
        "num_test_tasks": config["num_test_tasks"],
        "device": provenance.device(),
        "versions": config["versions"],
        "commit": config["commit"],
        "matmul_precision": config["matmul_precision"],
        "compute_dtype": preset.compute_dtype,
        "floor": {"nearest_neighbour": floor},
        "runs": {run.label: _run_results(preset, run) for run in runs},
        "gradient": gradient,
    }


def _run_results(preset: Preset, run: Run) -> dict[str, Any]:
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
        "inner_lr": run.candidate.spec.inner_lr,
    }


def to_json(value: Any) -> Any:
    """Returns a value with arrays as lists and every number that is not finite as None.

    >>> to_json({"mean": np.array([0.5, np.nan])})
    {'mean': [0.5, None]}
    """
    if isinstance(value, dict):
        return {str(name): to_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if hasattr(value, "tolist"):
        return to_json(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a value to a file, whole or not at all."""
    text = json.dumps(to_json(value), indent=2, allow_nan=False) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode())
