"""The classes that a saved run is tested on, which its training should not have seen."""

import warnings
from collections.abc import Sequence

from jaxmaml.data import datasets
from jaxmaml.data.class_splits import ClassSplit
from jaxmaml.experiments.presets import Preset
from jaxmaml.experiments.tasks import located

_LISTED = 3
"""The most classes that a message names."""


def classes_of_test(
    preset: Preset, trained: Preset, class_split: ClassSplit | None
) -> ClassSplit | None:
    """Returns the classes of a test for which no split is given; None if the dataset has its own.

    They are those of the run's own test, whatever its split file holds today, if the dataset is that of
    the run or a folder that has them. In another folder they are all classes that training and
    validation have not seen.

    Args:
        preset: the settings of the test.
        trained: those of the training.
        class_split: the class names of each split of the training; None outside images.

    Raises:
        ValueError: the folder does not exist, or the run has seen all of its classes.
    """
    if class_split is None:
        return None
    own = {"test": class_split["test"]}
    if located(preset, None)[0].dataset == trained.dataset:
        return own
    if not preset.dataset.startswith("folder:"):
        return None
    names = datasets.class_names(preset.dataset)
    return own if set(own["test"]) <= set(names) else {"test": _new(preset, names, class_split)}


def _new(preset: Preset, names: Sequence[str], class_split: ClassSplit) -> list[str]:
    seen = {*class_split["train"], *class_split["val"]}
    new = [name for name in names if name not in seen]
    if not new:
        raise ValueError(
            f"the run was trained or validated on all {len(names)} classes of {preset.dataset!r}: add "
            "others, or name the classes of the test in a split file (--split)"
        )
    return new


def warn_of_seen(tested: Sequence[str], class_split: ClassSplit) -> None:
    """Warns if classes of a test are classes of the training, by their names.

    Args:
        tested: the class names of the test.
        class_split: those of each split of the training.

    >>> warn_of_seen(["emu"], {"train": ["cat"], "val": ["dog"], "test": ["owl"]})
    """
    trained = set(class_split["train"])
    seen = [name for name in tested if name in trained]
    if seen:
        listed = ", ".join(map(repr, seen[:_LISTED])) + ", ..." * (len(seen) > _LISTED)
        is_part = len(seen) < len(tested)
        meaning = "is not one on new classes only" if is_part else "says nothing about new classes"
        warnings.warn(
            f"{len(seen)} of the {len(tested)} classes of the test are classes of the training "
            f"({listed}): the score {meaning}",
            stacklevel=2,
        )
