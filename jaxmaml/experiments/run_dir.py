"""The run directory: every file of it, its name, its contents, writing and reading.

A directory holds one or several runs::

    config.json        all that is needed to run or evaluate again, written before the other files
    metrics.jsonl      one row per outer step and per validation of each run
    training/LABEL     checkpoints of the training of each run, from which it goes on
    checkpoints/LABEL  the state of each run that was tested
    averaged/LABEL     the states whose predictions were averaged in a further test, if any were
    results.json       the scores and costs of each run, written last: a complete directory has it
    *.png              see `figures`; the learning curves are drawn during the training, too
    tensorboard/LABEL  the rows of each run as event files, see `event_files`
    report             see `report.writing`
    .lock              the lock of the process that writes the directory, removed at its end

The first file is written after the first outer steps, so that a start that fails leaves nothing.
JSON holds null for a number that is not finite. Files are written whole or not at all, and never
over those of another configuration. config.json has a digest of itself, and each checkpoint one of the
settings that it was trained with. The keys of results.json are a stable interface.

A row of metrics.jsonl has "label", "step" and
- for an outer step "loss", "query_loss" and "grad_norm", and with on_nonfinite="skip" also "skipped";
- for a validation "val_per_step", "val_ci95_per_step", "val_num_nonfinite" and "val_criterion", the
  number that selects a state: the lower, the better, and null without selection_steps.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from jaxmaml import checkpoint, processes
from jaxmaml.experiments import provenance
from jaxmaml.experiments.candidates import Spec
from jaxmaml.experiments.presets import Preset
from jaxmaml.files import WriteError, atomic_write, json_digest, locked, remove_partial
from jaxmaml.types import MetaState

Gradient: TypeAlias = dict[str, list[float]]
"""{"cosine", "norm_ratio", "step"}: first-order against exact meta-gradients along a run."""


PLOTS = (
    *("metric_per_step", "learning_curves", "gradient_agreement", "regression", "episode"),
    *("trajectories", "actions", "frames"),
)
"""The names of all plots of a run directory, without their suffix."""
_NOT_TRAINED_WITH = ("versions", "commit", "num_test_tasks", "digest", "class_sizes")
"""Keys of config.json that do not decide which parameters a run has after a step."""


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
        """Returns the directory of the state of a run that was tested."""
        return self.path / "checkpoints" / label

    def averaged(self, label: str) -> pathlib.Path:
        """Returns the directory of the states of a run whose predictions were averaged."""
        return self.path / "averaged" / label

    def training(self, label: str) -> pathlib.Path:
        """Returns the directory of the checkpoints of the training of a run."""
        return self.path / "training" / label

    @property
    def event_files(self) -> pathlib.Path:
        """The directory of the event files of TensorBoard."""
        return self.path / "tensorboard"

    def plot(self, name: str) -> pathlib.Path:
        """Returns the file of a plot, whose name is one of `PLOTS`."""
        assert name in PLOTS, name
        return self.path / f"{name}.png"

    def check_vacant(self) -> None:
        """Raises ValueError if the path is a file, or a directory with any file of a run."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--out {self.path} is a file: name a directory")
        plots = [self.plot(name) for name in PLOTS]
        names = ("checkpoints", "averaged", "training")
        folders = [*(self.path / name for name in names), self.event_files]
        files = [self.config, self.results, self.metrics, *folders, *plots]
        found = [path.name for path in files if os.path.lexists(path)]
        if found:
            raise ValueError(
                f"--out {self.path} holds another run ({found[0]}): name a new directory"
            )

    @contextlib.contextmanager
    def claimed(self) -> Iterator[dict[str, Any] | None]:
        """Keeps every other command out of the directory, and gives the config.json that it holds.

        It is None if the directory is vacant. At the end, the directories that were made for it are
        removed if they are still empty.

        Raises:
            ValueError: the directory is in use, holds files of a run without a config.json of this
                version, or cannot be written.
        """
        with contextlib.ExitStack() as stack:
            yield processes.from_first(lambda: stack.enter_context(self._claimed()))

    @contextlib.contextmanager
    def _claimed(self) -> Iterator[dict[str, Any] | None]:
        self._held()
        made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            with locked(self.path / ".lock"):
                yield self._held()  # nobody else writes from here on
        finally:
            with contextlib.suppress(OSError):  # not empty
                for path in made:
                    path.rmdir()

    def _held(self) -> dict[str, Any] | None:
        """Returns config.json, or None if the directory is vacant; raises ValueError otherwise."""
        if self.config.is_file():
            return self.read_config()
        self.check_vacant()
        return None

    def reopen(self, config: dict[str, Any]) -> None:
        """Makes the directory of a run one that is not complete, and writes its config.json.

        What stays is the training: config.json, metrics.jsonl and the checkpoints. What an interrupted
        process left half-written is removed.

        Raises:
            WriteError: config.json cannot be written.
        """
        # The results come first: without them, the directory is not complete.
        self.results.unlink(missing_ok=True)
        for name in ("checkpoints", "averaged"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in PLOTS:
            self.plot(name).unlink(missing_ok=True)
        for name in (self.config, self.results, self.metrics, *map(self.plot, PLOTS)):
            remove_partial(name)
        write_json(self.config, config)

    def cut_metrics(self, is_kept: Callable[[dict[str, Any]], bool]) -> None:
        """Removes rows from metrics.jsonl, and what is not a whole row.

        Raises:
            WriteError: the file cannot be written.
        """
        if not self.metrics.is_file():
            return
        lines = self.metrics.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _is_row(line) and is_kept(json.loads(line))]
        if len(kept) < len(lines):
            with atomic_write(self.metrics) as file:
                file.writelines(kept)

    def read_metrics(self, label: str) -> list[dict[str, Any]]:
        """Returns the whole rows of a run in metrics.jsonl."""
        lines = self.metrics.read_bytes().splitlines() if self.metrics.is_file() else []
        rows = [json.loads(line) for line in lines if _is_row(line)]
        return [row for row in rows if row["label"] == label]

    def create(self, config: dict[str, Any]) -> None:
        """Writes config.json.

        Raises:
            ValueError: the directory holds another run, or cannot be written.
        """
        self.check_vacant()
        write_json(self.config, config, replace=False)

    def append_metrics(self, rows: Iterable[dict[str, Any]]) -> None:
        """Appends rows to metrics.jsonl in a single write, so that no row is ever cut.

        Raises:
            ValueError: the file cannot be written.
        """
        lines = "".join(json.dumps(to_json(row), allow_nan=False) + "\n" for row in rows).encode()
        try:
            with self.metrics.open("ab", buffering=0) as file:
                before = self.metrics.stat().st_size
                if file.write(lines) < len(lines):  # what is left of a disk that is almost full
                    file.truncate(before)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise WriteError(f"{self.metrics} cannot be written: {error}") from error

    def save_state(self, label: str, meta_state: MetaState, config: Mapping[str, Any]) -> None:
        """Saves the state of a run.

        Raises:
            ValueError: the run has a state already, or it cannot be written.
        """
        path = self.checkpoint(label)
        checkpoint.save(path, meta_state, config=_trained_with(label, config))

    def restore_state(self, label: str, like: MetaState, config: Mapping[str, Any]) -> MetaState:
        """Returns the state of a run, in the structure of `like`.

        Raises:
            ValueError: see `verify_state`; or the state belongs to another model.
        """
        path = self.checkpoint(label)
        return checkpoint.restore(path, like, config=_trained_with(label, config))

    def save_averaged(
        self, label: str, meta_states: Sequence[MetaState], config: Mapping[str, Any]
    ) -> None:
        """Saves the states of a run whose predictions are averaged; the rest is as in `save_state`."""
        record = {"num_states": len(meta_states)}
        config = _trained_with(label, config)
        checkpoint.save(self.averaged(label), list(meta_states), config=config, record=record)

    def restore_averaged(
        self, label: str, like: MetaState, config: Mapping[str, Any]
    ) -> list[MetaState]:
        """Returns the states of `save_averaged`, each in the structure of `like`.

        Raises:
            ValueError: see `verify_state`; or the states belong to another model.
        """
        path, config = self.averaged(label), _trained_with(label, config)
        checkpoint.verify(path, config=config)
        num_states = checkpoint.read_record(path)["num_states"]
        return checkpoint.restore(path, [like] * num_states, config=config)

    def verify_state(self, label: str, config: Mapping[str, Any]) -> None:
        """Raises ValueError unless the state of a run is whole and was trained with a config.

        Raises:
            ValueError: there is no such state, a file of it is damaged, or it was trained with
                another config or under another label.
        """
        paths = [self.checkpoint(label)]
        if config["preset"].get("num_averaged", 0) > 1:
            paths.append(self.averaged(label))
        for path in paths:
            if not path.is_dir():
                raise ValueError(
                    f"{self.path} has no tested state of {label!r}: its training was interrupted, and "
                    "the command that started it continues it"
                )
            checkpoint.verify(path, config=_trained_with(label, config))

    def read_config(self) -> dict[str, Any]:
        """Returns the contents of config.json.

        Raises:
            ValueError: the directory holds no run, or its config.json is not as it was written.
        """
        if not self.config.is_file():
            reason = "no config.json" if self.path.is_dir() else "it does not exist"
            raise ValueError(
                f"RUN_DIR {self.path} holds no run ({reason}): name a directory that "
                "jaxmaml train or jaxmaml compare wrote"
            )
        try:
            config = json.loads(self.config.read_text("utf-8"))
        except OSError as error:
            raise ValueError(f"{self.config} cannot be read: {error}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.config} is not JSON: {error}") from None
        self._check_config(config)
        return config

    def _check_config(self, config: Any) -> None:
        """Raises ValueError unless a config.json is as it was written, by such a version."""
        digest = config.get("digest") if isinstance(config, dict) else None
        if digest is None or digest != _digest(config):
            raise ValueError(
                f"{self.config} is not as it was written (its digest differs): the checkpoints "
                "belong to other settings than these, or it is of another version of jaxmaml"
            )
        try:
            preset_of(config)
            specs_of(config)
        except (TypeError, KeyError) as error:
            raise ValueError(f"{self.config} is of another version of jaxmaml: {error}") from None


def make_config(
    preset: Preset,
    specs: Sequence[Spec],
    *,
    seed: int,
    num_test_tasks: int,
    data_dir: pathlib.Path | None,
    matmul_precision: str,
    input_shape: tuple[int, ...],
    class_split: Mapping[str, Sequence[str]] | None,
    class_sizes: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Returns the contents of config.json: all that is needed to run or evaluate again.

    Args:
        preset: the settings, with absolute paths.
        specs: the descriptions of the runs.
        seed: the seed of the initial parameters and of the training episodes; the first of several.
        num_test_tasks: tasks of the test.
        data_dir: the directory of the dataset; None for the default of a dataset without one.
        matmul_precision: the precision of matrix products.
        input_shape: the shape of one example.
        class_split: the class names of each split; None for regression.
        class_sizes: the number of images of each class of a folder, whose files may change; None for
            other datasets.
    """
    config = {
        "preset": dataclasses.asdict(preset),
        "num_seeds": len({spec.seed for spec in specs}),
        "runs": [spec._asdict() for spec in specs],
        "seed": seed,
        "num_test_tasks": num_test_tasks,
        "data_dir": None if data_dir is None else str(data_dir.absolute()),
        "matmul_precision": matmul_precision,
        "input_shape": list(input_shape),
        "class_split": class_split,
        "class_sizes": class_sizes,
        "versions": provenance.versions(),
        "commit": provenance.commit(),
    }
    config = json.loads(json.dumps(to_json(config)))  # as it will be read again
    return {**config, "digest": _digest(config)}


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


def write_json(path: pathlib.Path, value: Any, *, replace: bool = True) -> None:
    """Writes a value to a file, whole or not at all.

    Raises:
        ValueError: the file cannot be written, or it exists and is not to be replaced.
    """
    text = json.dumps(to_json(value), indent=2, allow_nan=False) + "\n"
    with atomic_write(path, replace=replace) as file:
        file.write(text.encode())


def _digest(config: Mapping[str, Any]) -> str:
    """Returns the digest that a config.json holds of its other keys."""
    return json_digest({name: value for name, value in config.items() if name != "digest"})


def _is_row(line: bytes) -> bool:
    """Returns whether a line of metrics.jsonl is a whole row."""
    try:
        return {"label", "step"} <= set(json.loads(line))
    except (ValueError, TypeError):
        return False


def trained_for(label: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what decides the parameters of a run after a step, whatever the number of steps is."""
    found = _trained_with(label, config)
    preset = {**config["preset"], "num_outer_steps": None}
    return {**found, "config": {**found["config"], "preset": preset}}


def _trained_with(label: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what decides the parameters of a run, as its checkpoint keeps it."""
    kept = {name: value for name, value in config.items() if name not in _NOT_TRAINED_WITH}
    return {"label": label, "config": kept}
