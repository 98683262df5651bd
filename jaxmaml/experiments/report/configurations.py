"""The configurations of runs: what differs between them, and all of it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxmaml import files
from jaxmaml.experiments.report.blocks import Listing
from jaxmaml.experiments.report.saved_runs import SavedDirectory, SavedRun
from jaxmaml.experiments.settings import DOCUMENTATION

_LEFT_OUT = ("runs", "digest", *(f"preset.{name}" for name in DOCUMENTATION))
"""Entries of config.json that are not settings of one run."""
_MAX_LENGTH = 80
"""The most characters of a value; the full configuration has all of them."""


def differences(
    directories: Sequence[SavedDirectory],
) -> tuple[list[str], list[tuple[str, ...]]]:
    """Returns the names of the runs, and a row (setting, value of each run) per setting that differs."""
    runs = [(directory, run) for directory in directories for run in directory.runs]
    settings = [_settings(directory, run) for directory, run in runs]
    names = list(dict.fromkeys(name for found in settings for name in found))
    rows = [(name, *(found.get(name, "absent") for found in settings)) for name in names]
    return [run.name for _, run in runs], [row for row in rows if len(set(row[1:])) > 1]


def listing(directory: SavedDirectory) -> Listing:
    """Returns config.json, to be folded away."""
    text = json.dumps(directory.config, indent=2, ensure_ascii=False)
    return Listing(f"config.json of {directory.path}", text, "json")


def _settings(directory: SavedDirectory, run: SavedRun) -> dict[str, str]:
    """Returns the settings of a run, as texts by name."""
    of_classes = ("class_split", "class_sizes")
    config = {name: value for name, value in directory.config.items() if name not in of_classes}
    flat = dict(_flat(config)) | dict(_flat(run.spec._asdict())) | {"seed": run.seed}
    found = {
        name.removeprefix("preset."): _text(value)
        for name, value in flat.items()
        if name not in (*_LEFT_OUT, "label", "preset.inner_lr")
    }
    if directory.results is not None:
        found["device"] = _text(directory.results.get("device"))
    return found | {"classes": _classes(directory.config["class_split"])}


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values of nested dicts with their dotted names."""
    for name, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", item


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}..."


def _classes(class_split: Mapping[str, Sequence[str]] | None) -> str:
    """Returns the number of classes of each split, and a digest that tells other classes apart."""
    if class_split is None:
        return "none"
    counts = ", ".join(f"{len(names)} {split}" for split, names in class_split.items())
    return f"{counts} ({files.json_digest(class_split)[:8]})"
