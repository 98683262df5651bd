"""The ranges of settings, checked before anything is built."""

import itertools
import math
from typing import Any

import numpy as np

from jaxmaml.checks import check_count
from jaxmaml.experiments.settings import Preset

MAX_COUNT = 2**31 - 1
"""The largest count: JAX counts in 32 bits."""
MAX_SEEDS = 1000
"""The most seeds of a learner, each of which is a run."""
MAX_INNER_STEPS = 100_000
"""The most inner steps; published work makes up to a few hundred."""
MAX_PARAMETERS = 10**9
"""The most parameters of a network: 4 GB, of which training keeps several copies."""
MAX_VALUES = 10**10
"""The most numbers in the images of all tasks of a step: 40 GB."""
ASSUMED_IMAGE_SIZE, ASSUMED_CHANNELS = 84, 3
"""The shape of an image while its dataset has not been read."""
ASSUMED_OBSERVATION_SIZE = 20
"""The length of an observation, which is not asked of the environment."""
SMALLEST = float(np.finfo(np.float32).tiny)

_COUNTS = {
    **dict.fromkeys(("way", "shot", "query", "test_query", "num_tasks", "num_outer_steps"), 1),
    **dict.fromkeys(("num_validations", "image_size", "crop", "num_averaged", "patience"), 0),
    **dict.fromkeys(("num_filters", "num_trajectories", "horizon"), 1),
    "num_val_tasks": 2,
}
"""The least value of each count."""


_EPISODE_SIZES = ("way", "shot", "query", "test_query", "image_size")
_SIZES = {
    "classification": _EPISODE_SIZES,
    "regression": _EPISODE_SIZES,
    "reinforcement": ("num_trajectories", "horizon", "num_inner_steps"),
}
"""The settings that decide about the size of a task."""


def check(preset: Preset) -> None:
    """Raises TypeError or ValueError unless every setting is within its range."""
    _check_counts(preset)
    _check_numbers(preset)
    _check_inner_steps(preset)
    _check_size(preset)


def check_whole(name: str, value: Any, *, minimum: int = 1, maximum: int = MAX_COUNT) -> None:
    """Raises TypeError or ValueError unless a value is an integer from `minimum` to `maximum`.

    >>> check_whole("way", 5, minimum=2)
    """
    if check_count(name, value, minimum=minimum) > maximum:
        raise ValueError(f"{name} must be at most {maximum:,}; got {value!r}")


def check_number(name: str, value: float, *, below: float = math.inf) -> None:
    """Raises ValueError unless a number is 0 or more, below a limit, and float32 can hold it.

    >>> check_number("inner_lr", 0.4)
    """
    with np.errstate(over="ignore"):
        held = float(np.float32(value))
    # Smaller numbers than the smallest one are zero on most processors.
    if not (held == value == 0 or SMALLEST <= held < below):
        limit = "" if below == math.inf else f" and below {below:g}"
        raise ValueError(
            f"{name} must be 0 or more{limit}, and finite and not rounded to 0 in float32; "
            f"got {value!r}"
        )


def _check_counts(preset: Preset) -> None:
    for name, minimum in _COUNTS.items():
        check_whole(name, getattr(preset, name), minimum=minimum)
    for size in preset.hidden_sizes:
        check_whole("each of hidden_sizes", size)
    if preset.chunk_size not in ("auto", "all"):
        if isinstance(preset.chunk_size, str):
            _refuse(preset, "chunk_size", "must be a number, auto or all")
        check_whole("chunk_size", preset.chunk_size)
    if preset.is_regression and preset.way != 1:
        _refuse(preset, "way", "must be 1 for regression")
    if preset.domain != "reinforcement" and preset.outer != "adam":
        _refuse(preset, "outer", "must be adam outside environments")
    if preset.domain == "classification" and preset.way < 2:
        _refuse(preset, "way", "must be 2 or more for images, which are classified")


def _check_numbers(preset: Preset) -> None:
    for name in (
        *("inner_lr", "later_inner_lr", "outer_lr", "max_kl", "head_scale", "jitter", "outer_clip"),
    ):
        check_number(name, getattr(preset, name))
    check_number("averaging", preset.averaging, below=1)
    for name in ("discount", "gae_lambda"):
        if not 0 <= getattr(preset, name) <= 1:
            _refuse(preset, name, "must be between 0 and 1")
    if preset.max_kl == 0:
        _refuse(preset, "max_kl", "must be positive")


def _check_inner_steps(preset: Preset) -> None:
    last = preset.num_test_inner_steps
    check_whole("num_inner_steps", preset.num_inner_steps, minimum=0, maximum=MAX_INNER_STEPS)
    check_whole("num_test_inner_steps", last, minimum=0, maximum=MAX_INNER_STEPS)
    for name, steps in (
        ("headline_step", (preset.headline_step,)), ("selection_steps", preset.selection_steps)
    ):  # fmt: skip
        for step in steps:
            check_count(name, step, minimum=0)
        if any(step > last for step in steps):
            _refuse(preset, name, f"must be between 0 and num_test_inner_steps={last}")


def _check_size(preset: Preset) -> None:
    """Raises ValueError if the network or the tasks are larger than any machine could hold."""
    number = num_parameters(preset)
    if number > MAX_PARAMETERS:
        names = ("hidden_sizes",) if preset.model == "mlp" else ("num_filters",)
        _refuse_size(
            preset, f"the network would have about {number:,} parameters", MAX_PARAMETERS,
            (*names, "way", "image_size"),
        )  # fmt: skip
    number = num_values(preset)
    if number > MAX_VALUES:
        _refuse_size(
            preset, f"the tasks of a step would have about {number:,} numbers", MAX_VALUES,
            ("num_tasks", *_SIZES[preset.domain]),
        )  # fmt: skip


def num_parameters(preset: Preset) -> int:
    """Returns about how many parameters the network has, without those of the normalization."""
    filters, size = preset.num_filters, preset.image_size or ASSUMED_IMAGE_SIZE
    if preset.model == "mlp":
        sizes = (_example_size(preset), *preset.hidden_sizes, preset.way)
        return sum(a * b for a, b in itertools.pairwise(sizes))
    if preset.model == "resnet12":
        sizes = (ASSUMED_CHANNELS, *(filters * factor for factor in (1, 2, 4, 8)))
        blocks = (10 * a * b + 18 * b * b for a, b in itertools.pairwise(sizes))
        return sum(blocks) + sizes[-1] * preset.way
    num_features = filters * (max(1, size // 16) ** 2 if preset.pooled else 1)
    return 9 * filters * (ASSUMED_CHANNELS + 3 * filters) + num_features * preset.way


def num_values(preset: Preset) -> int:
    """Returns about how many numbers the images, or observations, of one outer step have."""
    if preset.domain == "reinforcement":
        num_steps = preset.num_trajectories * preset.horizon * (preset.num_inner_steps + 1)
        return preset.num_tasks * num_steps * ASSUMED_OBSERVATION_SIZE
    num_examples = preset.way * (preset.shot + max(preset.query, preset.test_query))
    return preset.num_tasks * num_examples * _example_size(preset)


def _example_size(preset: Preset) -> int:
    if preset.is_regression:
        return 1
    if preset.domain == "reinforcement":
        return ASSUMED_OBSERVATION_SIZE
    return ASSUMED_CHANNELS * (preset.image_size or ASSUMED_IMAGE_SIZE) ** 2


def _refuse(preset: Preset, name: str, rule: str) -> None:
    raise ValueError(f"{name} {rule}; got {getattr(preset, name)!r}")


def _refuse_size(preset: Preset, what: str, limit: int, names: tuple[str, ...]) -> None:
    given = ", ".join(f"{name}={getattr(preset, name)}" for name in names)
    raise ValueError(f"{what}, and the limit is {limit:,}; reduce one of {given}")
