"""Decides whether a run directory is continued: it is if it holds the same configuration."""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxmaml import processes
from jaxmaml.experiments.run_dir import preset_of, specs_of

_NOT_COMPARED = ("commit", "digest")
"""Keys of config.json that may differ between two parts of a run."""
_STEPS = "preset.num_outer_steps"
_MAX_LENGTH = 60
"""The most characters of a value in a message."""


def check_same(out: Path, held: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises ValueError, with the differences, unless a directory can be continued.

    Args:
        out: the directory.
        held: the contents of its config.json.
        config: those that the command would write. Its number of outer steps may be larger.
    """
    before, now = (dict(_flat({**found, "class_sizes": None})) for found in (held, config))
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    is_longer = now.get(_STEPS, 0) > before.get(_STEPS, 0)
    if names == [_STEPS] and is_longer:
        if reasons := reasons_against_more_steps(config):
            raise ValueError(
                f"num_outer_steps cannot be raised with {reasons[0]}: name a new directory"
            )
        return
    if names:
        # What may differ, and what follows from the settings, is listed only where nothing else is.
        minor = {"runs", _STEPS} if is_longer else {"runs"}
        told = [name for name in names if name not in minor] or names
        listed = ", ".join(_difference(name, before, now) for name in told)
        raise ValueError(
            f"--out {out} holds another run, and is continued by the same settings only: {listed}; "
            "name a new directory"
        )


def warn_of_changed_images(held: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Warns if the classes of a folder have other numbers of images than when their run began.

    Args:
        held: the contents of config.json, which may be that of a version that kept no numbers.
        config: those that the command would write.
    """
    before, now = held.get("class_sizes") or {}, config["class_sizes"] or {}
    changed = [name for name in now if name in before and before[name] != now[name]]
    if changed:
        name = changed[0]
        warnings.warn(
            f"{config['preset']['dataset']} has changed since this run began: {len(changed)} of "
            f"{len(now)} classes have other numbers of pictures, such as {name!r}, {before[name]} then "
            f"and {now[name]} now",
            stacklevel=2,
        )


def check_same_processes(config: Mapping[str, Any]) -> None:
    """Raises ValueError, with the differences, unless all processes have the same configuration.

    Where data lie may differ between machines.

    Args:
        config: what this process would write to config.json.
    """
    flat = {name: value for name, value in _flat(config) if name != "data_dir"}
    for process, found in enumerate(processes.gathered(flat)):
        names = [name for name in {**flat, **found} if flat.get(name) != found.get(name)]
        if names:
            other, own = f"process {process}", f"process {jax.process_index()}"
            raise ValueError(
                f"{other} and {own} have other settings, and must have the same: "
                + ", ".join(_difference(name, found, flat) for name in names)
            )


def reasons_against_more_steps(config: Mapping[str, Any]) -> list[str]:
    """Returns why a run cannot be made longer: its number of outer steps decides how it begins.

    Args:
        config: the contents of its config.json.
    """
    preset, reasons = preset_of(dict(config)), []
    if preset.outer_schedule == "cosine":
        reasons.append("outer_schedule='cosine', whose schedule depends on it")
    if preset.patience:
        reasons.append(f"patience={preset.patience}, whose validations are spread over all steps")
    return reasons + [
        f"learner {spec.learner!r}, whose schedule depends on it"
        for spec in specs_of(dict(config))
        if spec.learner == "maml_plus_plus"
    ]


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values of nested dicts with their dotted names."""
    for name, item in value.items():
        if not prefix and name in _NOT_COMPARED:
            continue
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", item


def _difference(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    values = [_short(repr(values.get(name, "absent"))) for values in (before, now)]
    return f"{name.removeprefix('preset.')} is {values[0]} there and {values[1]} here"


def _short(text: str) -> str:
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}..."
