"""Checks of the inputs and targets that a trained run adapts to and predicts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmaml.experiments.settings import Preset


def check_takes_examples(preset: Preset) -> None:
    """Raises ValueError if a run is a policy, which adapts in its environment."""
    if preset.domain == "reinforcement":
        raise ValueError(
            f"a run of {preset.name} is a policy, which adapts in its environment and takes no files: "
            "jaxmaml evaluate RUN_DIR tests it"
        )


def pixels(inputs: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Returns pictures as uint8 `[num_images, H, W, C]`.

    Args:
        inputs: what was given.
        shape: (H, W, C) of the training.

    Raises:
        TypeError: they are not uint8.
        ValueError: they have another shape.

    >>> pixels(np.zeros((2, 8, 8, 1), np.uint8), (8, 8, 1)).shape
    (2, 8, 8, 1)
    """
    inputs = np.asarray(inputs)
    if inputs.dtype != np.uint8:
        raise TypeError(
            f"inputs must be uint8 pixels, 0 to 255, as they are scaled here; got {inputs.dtype}"
        )
    if inputs.shape[1:] != shape:
        wanted = ", ".join(map(str, shape))
        raise ValueError(
            f"inputs must be [num_images, {wanted}], as in training; got shape {inputs.shape}"
        )
    return inputs


def points(name: str, values: Any) -> np.ndarray:
    """Returns numbers as float32 `[n, 1]`."""
    try:
        with np.errstate(over="ignore"):  # refused below
            points = np.asarray(values, np.float32)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be numbers; got {values!r:.60}") from None
    if points.ndim not in (1, 2) or points.shape[1:] not in ((), (1,)):
        raise ValueError(f"{name} must be [n] or [n, 1]; got shape {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError(f"{name} must be finite, also in float32")
    return points.reshape(-1, 1)


def class_names(targets: np.ndarray, names: Sequence[str] | None) -> tuple[str, ...]:
    """Returns the names of the classes of a support, each of which has an example."""
    if targets.ndim != 1 or not len(targets) or not np.issubdtype(targets.dtype, np.integer):
        raise TypeError(
            f"targets must be integers [n], one or more; got {targets.dtype}{list(targets.shape)}"
        )
    if targets.min() < 0:
        raise ValueError(f"targets must be 0 or more; got {targets.min()}")
    way = int(targets.max()) + 1 if names is None else len(names)
    if names is None and way > len(targets):  # whose names would perhaps not fit into memory
        first = next(i for i, target in enumerate(np.unique(targets)) if target != i)
        raise ValueError(f"class '{first}' has no example in the support")
    names = tuple(map(str, range(way) if names is None else names))
    if len(set(names)) != way or targets.max() >= way:
        raise ValueError(
            f"classes must be distinct names, one for each of the targets 0..{targets.max()}; got "
            f"{names}"
        )
    missing = sorted(set(range(way)) - set(targets.tolist()))
    if missing:
        raise ValueError(f"class {names[missing[0]]!r} has no example in the support")
    return names
