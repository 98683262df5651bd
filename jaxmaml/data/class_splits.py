"""Class splits: which classes are for "train", "val" and "test".

They are lists of class names in files. A program that trains never draws one anew: for a folder without
a split file, the commands draw it once and keep it in the configuration of the run.
"""

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from jaxmaml import files

SPLITS = ("train", "val", "test")
FRACTIONS = (0.64, 0.16, 0.2)
"""The fractions of the classes for train, val and test, by default."""
ClassSplit: TypeAlias = dict[str, list[str]]
"""The class names of each of `SPLITS`."""


def published(name: str) -> ClassSplit:
    """Returns a class split that comes with the package.

    Args:
        name: the name of a file in `splits/`, without its suffix.

    Returns:
        The class names of "train", "val" and "test".

    Example:
        >>> class_split = published("omniglot_finn")
        >>> {split: len(names) for split, names in class_split.items()}
        {'train': 1100, 'val': 100, 'test': 423}
    """
    text = resources.files("jaxmaml.data").joinpath("splits", f"{name}.json").read_text("utf-8")
    content = json.loads(text)
    return {split: content[split] for split in SPLITS}


def omniglot(name: str) -> ClassSplit:
    """Returns a class split of Omniglot with the names that TFDS gives the characters.

    Args:
        name: "finn" or "vinyals".

    Returns:
        The class names of "train", "val" and "test".

    Example:
        >>> omniglot("vinyals")["train"][0]
        'Alphabet_of_the_Magi_0'
    """
    class_split = published(f"omniglot_{name}")
    if name == "vinyals":
        return {split: [_tfds_name(n) for n in names] for split, names in class_split.items()}
    return class_split


def read(path: Path) -> ClassSplit:
    """Returns the class split in a file of the user.

    Args:
        path: a JSON file, `{"train": [names], "val": [names], "test": [names]}`. Other keys are
            ignored. The config.json of a run, which holds the same under "class_split", is one too.

    Returns:
        The class names of "train", "val" and "test".

    Raises:
        ValueError: the file cannot be read, is not JSON, or lacks a split.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = Path(directory, "split.json")
        ...     write(path, {"train": ["cat"], "val": ["dog"], "test": ["emu"]}, seed=0)
        ...     read(path)
        {'train': ['cat'], 'val': ['dog'], 'test': ['emu']}
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"split file {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"split file {path} is not JSON: {error}") from None
    if isinstance(content, dict):
        content = content.get("class_split", content)
    for split in SPLITS:
        names = content.get(split) if isinstance(content, dict) else None
        if not names or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise ValueError(f"split file {path} must have a list of class names for {split!r}")
    return {split: content[split] for split in SPLITS}


def draw(
    names: Sequence[str],
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
    *,
    smallest: int = 0,
) -> ClassSplit:
    """Divides classes at random. Call it once and keep the result with `write`.

    Args:
        names: the names of all classes.
        fractions: the fractions of train, val and test, which add up to 1.
        seed: the seed of the shuffle, 0 to 2^32 - 1.
        smallest: classes that val and test get at least, at the expense of train.

    Returns:
        The class names of "train", "val" and "test", each sorted.

    Raises:
        ValueError: the fractions are not three positive numbers that add up to 1, the seed is out of
            its range, or a split would have no classes, or fewer than `smallest`.

    Example:
        >>> class_split = draw("abcdefghij", (0.6, 0.2, 0.2), seed=0)
        >>> {split: len(names) for split, names in class_split.items()}
        {'train': 6, 'val': 2, 'test': 2}
    """
    # A comparison with NaN is false.
    are_positive = all(fraction > 0 for fraction in fractions)
    if len(fractions) != 3 or not are_positive or not abs(sum(fractions) - 1) <= 1e-9:
        raise ValueError(
            f"fractions must be three positive numbers that add up to 1; got {tuple(fractions)}"
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be between 0 and {2**32 - 1:,}; got {seed!r}")
    order = np.random.RandomState(seed).permutation(sorted(names))
    ends = np.round(np.cumsum(fractions[:2]) * len(order)).astype(int)
    num_val, num_test = np.maximum(np.diff([*ends, len(order)]), smallest)
    ends = [max(0, len(order) - num_val - num_test), max(0, len(order) - num_test)]
    divided = [sorted(drawn.tolist()) for drawn in np.split(order, ends)]
    if min(map(len, divided)) < max(1, smallest):
        least = f" with at least {smallest} in each split" if smallest else ""
        raise ValueError(
            f"{len(order)} classes are too few for fractions {tuple(fractions)}{least}"
        )
    return dict(zip(SPLITS, divided, strict=True))


def write(path: Path, class_split: Mapping[str, Sequence[str]], **about: Any) -> None:
    """Writes a file that `read` reads. An existing file is never overwritten.

    Args:
        path: the file to write.
        class_split: the class names of "train", "val" and "test".
        **about: how the class split was made, which the file records too.

    Raises:
        ValueError: the file exists, or cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = Path(directory, "split.json")
        ...     write(path, draw("abcdef", (0.5, 0.25, 0.25), seed=3), seed=3)
        ...     json.loads(path.read_text())["seed"]
        3
    """
    if path.exists():
        raise ValueError(f"{path} exists: a split is drawn once; remove it or choose another name")
    with files.atomic_write(path) as file:
        file.write(json.dumps({**about, **class_split}, indent=1).encode() + b"\n")


def _tfds_name(name: str) -> str:
    """Returns `Greek_0`, the name in TFDS, for the published name `Greek/character01`."""
    alphabet, character = name.split("/")
    return f"{alphabet}_{int(character.removeprefix('character')) - 1}"
