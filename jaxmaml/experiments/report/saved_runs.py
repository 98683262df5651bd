"""Run directories as the report reads them: complete, or as far as an unfinished training came."""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from jaxmaml.dispatch import SKIPPED
from jaxmaml.experiments.candidates import Spec
from jaxmaml.experiments.learners import LEARNERS
from jaxmaml.experiments.presets import Preset
from jaxmaml.experiments.run_dir import RunDir, preset_of, specs_of
from jaxmaml.experiments.scoring import Score, averaged_suffix

Rows: TypeAlias = list[dict[str, Any]]
"""Rows of metrics.jsonl."""


class SavedRun(NamedTuple):
    """A run of a directory.

    Attributes:
        name: the label, after the name of the directory if there are several.
        spec: the description of the run.
        preset: the settings, with the inner rate of the run.
        seed: the seed of the run.
        query_loss: the query loss of each outer step; NaN where it was not finite.
        skipped: whether each outer step was skipped, as it was not finite.
        validations: (outer step, score), in the order of the steps.
        test: the score on the test tasks; None if the run is not tested yet.
        averaged: the score of the mean of the predictions of several states; None without them.
        num_test_tasks: the tasks of the test.
        results: the entry of results.json; empty if there is none.
    """

    name: str
    spec: Spec
    preset: Preset
    seed: int
    query_loss: np.ndarray
    skipped: np.ndarray
    validations: list[tuple[int, Score]]
    test: Score | None
    averaged: Score | None
    num_test_tasks: int
    results: dict[str, Any]

    @property
    def num_outer_steps(self) -> int:
        """The outer steps that were made."""
        return self.results.get("num_outer_steps", len(self.query_loss))

    @property
    def num_skipped(self) -> int:
        """The outer steps that were left out because they were not finite."""
        return self.results.get("num_skipped", int(self.skipped.sum()))

    @property
    def status(self) -> str:
        """The state of the run in words, such as finished or unfinished."""
        made = f"outer step {self.num_outer_steps:,} of {self.preset.num_outer_steps:,}"
        if self.test is None:
            is_whole = self.num_outer_steps >= self.preset.num_outer_steps
            return f"unfinished: {made}" + ", not tested" * is_whole
        if self.results.get("stopped"):
            return f"not finite: {made}"
        return f"{'stopped early' if self.results.get('stopped_early') else 'finished'}: {made}"

    def scores(self) -> dict[tuple[Spec, str], Score]:
        """Returns the test scores with the suffixes of their names, as `Run.scores` does."""
        found = {} if self.test is None else {(self.spec, ""): self.test}
        if self.averaged is not None:
            suffix = averaged_suffix(len(self.results["averaged"]["steps"]))
            found[self.spec, suffix] = self.averaged
        return found


class SavedDirectory(NamedTuple):
    """A run directory.

    Attributes:
        path: the directory.
        name: its shortest name that differs from those of the others.
        config: the contents of config.json.
        results: the contents of results.json; None while the runs are unfinished.
        runs: its runs.
    """

    path: pathlib.Path
    name: str
    config: dict[str, Any]
    results: dict[str, Any] | None
    runs: list[SavedRun]


def read_all(paths: Sequence[pathlib.Path]) -> list[SavedDirectory]:
    """Returns the contents of run directories.

    Raises:
        ValueError: a directory holds no run, is damaged, or is named twice.
    """
    resolved = [path.resolve() for path in paths]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise ValueError(f"{paths[i]} is named twice: name each run directory once")
    return [read(path, name) for path, name in zip(paths, _names(resolved), strict=True)]


def read(path: pathlib.Path, name: str = "") -> SavedDirectory:
    """Returns the contents of a run directory.

    Args:
        path: the directory.
        name: what stands before the labels of its runs.

    Raises:
        ValueError: the directory holds no run, or is damaged.
    """
    directory = RunDir(path)
    config, results = directory.read_config(), _results(directory)
    rows: dict[str, Rows] = {spec.label: [] for spec in specs_of(config)}
    for row in _rows(directory, is_complete=results is not None):
        rows.setdefault(row["label"], []).append(row)
    try:
        runs = [
            _run(config, spec, name, rows[spec.label], results and results["runs"][spec.label])
            for spec in specs_of(config)
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(_damaged(path, f"{type(error).__name__}: {error}")) from None
    return SavedDirectory(path, name or path.resolve().name, config, results, runs)


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
    """Returns the shortest ends of paths that differ; "" for a single path."""
    if len(paths) == 1:
        return [""]
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _run(
    config: dict[str, Any], spec: Spec, name: str, rows: Rows, results: dict[str, Any] | None
) -> SavedRun:
    preset = preset_of(config)
    headline = LEARNERS[spec.learner].headline_step(preset)
    steps = sorted((row for row in rows if "loss" in row), key=lambda row: row["step"])
    validations = [
        (row["step"], _score(row, "val_per_step", "val_ci95_per_step", "val_num_nonfinite", headline))
        for row in rows
        if "val_per_step" in row
    ]  # fmt: skip
    tested = lambda found: (
        found and _score(found, preset.metric.key, "ci95_per_step", "num_nonfinite", headline)
    )
    return SavedRun(
        name=f"{name}/{spec.label}" if name else spec.label,
        spec=spec,
        preset=preset,
        seed=config["seed"] if spec.seed is None else spec.seed,
        query_loss=_floats([row["query_loss"] for row in steps]),
        skipped=np.array([row.get(SKIPPED, False) for row in steps], bool),
        validations=validations,
        test=tested(results),
        averaged=tested(results and results["averaged"]),
        num_test_tasks=config["num_test_tasks"],
        results=results or {},
    )


def _score(
    stored: dict[str, Any], mean: str, ci95: str, num_nonfinite: str, headline: int
) -> Score:
    means, half_widths = _floats(stored[mean]), _floats(stored[ci95])
    if not 0 < len(means) == len(half_widths):
        raise ValueError(f"{mean} and {ci95} have {len(means)} and {len(half_widths)} numbers")
    return Score(means, half_widths, int(stored[num_nonfinite]), min(headline, len(means) - 1))


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], float)


def _results(directory: RunDir) -> dict[str, Any] | None:
    if not directory.results.exists():
        return None
    try:
        found = json.loads(directory.results.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(_damaged(directory.results, error)) from None
    if not isinstance(found, dict):
        raise ValueError(_damaged(directory.results, "it is not an object"))
    return found


def _rows(directory: RunDir, *, is_complete: bool) -> Iterator[dict[str, Any]]:
    """Yields the rows of metrics.jsonl. Only the last row of an unfinished run may be half-written."""
    if not directory.metrics.exists() and not is_complete:
        return
    try:
        lines = directory.metrics.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise ValueError(_damaged(directory.metrics, error)) from None
    for number, line in enumerate(lines, start=1):
        is_partial = not is_complete and number == len(lines) and not line.endswith(b"\n")
        try:
            row = json.loads(line)
            _ = row["label"], row["step"]
        except (ValueError, TypeError, KeyError) as error:
            if is_partial:
                return
            raise ValueError(_damaged(directory.metrics, f"line {number}: {error}")) from None
        yield row


def _damaged(path: pathlib.Path, why: object) -> str:
    return f"{path} is damaged ({why}): restore it, or leave its directory out of the report"
