"""Which classes train, validate and test: lists in files, never drawn while a program runs."""

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from jaxmaml import files

PARTS = ("train", "val", "test")


def class_list(name: str) -> dict[str, list[str]]:
    """The classes of "train", "val" and "test" as the package's `splits/<name>.json` lists them.

    >>> {part: len(names) for part, names in class_list("omniglot_finn").items()}
    {'train': 1100, 'val': 100, 'test': 423}
    """
    text = resources.files("jaxmaml.data").joinpath("splits", f"{name}.json").read_text("utf-8")
    listed = json.loads(text)
    return {part: listed[part] for part in PARTS}


def read(path: Path) -> dict[str, list[str]]:
    """The classes of a user's file: `{"train": [names], "val": [names], "test": [names]}`.

    Raises:
        ValueError: it is missing, no JSON, or lacks a part.
    """
    try:
        listed = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"split file {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"split file {path} is no JSON: {error}") from None
    for part in PARTS:
        names = listed.get(part) if isinstance(listed, dict) else None
        if not names or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise ValueError(f"split file {path} must give a list of class names for {part!r}")
    return {part: listed[part] for part in PARTS}


def draw(names: Sequence[str], fractions: Sequence[float], seed: int) -> dict[str, list[str]]:
    """Divides classes at random, once: for `write`.

    Args:
        names: of all classes.
        fractions: of train, val and test; they add up to 1.
        seed: of the shuffle.

    Raises:
        ValueError: fractions that are not three positive numbers that add up to 1, or so few
            classes that a part is left without.

    >>> {part: len(names) for part, names in draw("abcdefghij", (0.6, 0.2, 0.2), 0).items()}
    {'train': 6, 'val': 2, 'test': 2}
    """
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(
            f"fractions must be three positive numbers that add up to 1, got {tuple(fractions)}"
        )
    order = np.random.RandomState(seed).permutation(sorted(names))
    ends = np.round(np.cumsum(fractions[:2]) * len(order)).astype(int)
    parts = [sorted(part.tolist()) for part in np.split(order, ends)]
    if not all(parts):
        raise ValueError(f"{len(order)} classes are too few for fractions {tuple(fractions)}")
    return dict(zip(PARTS, parts, strict=True))


def write(path: Path, listed: Mapping[str, Sequence[str]], **about: Any) -> None:
    """Writes a file that `read` reads, with what it was made of; never over another.

    Raises:
        ValueError: the file exists, or cannot be written.
    """
    if path.exists():
        raise ValueError(f"{path} exists: a split is drawn once; remove it or choose another name")
    with files.atomic_write(path) as file:
        file.write(json.dumps({**about, **listed}, indent=1).encode() + b"\n")


def omniglot(split: str) -> dict[str, list[str]]:
    """Omniglot's lists with the names that TFDS gives the characters."""
    listed = class_list(f"omniglot_{split}")
    if split == "vinyals":
        return {part: [_tfds_name(name) for name in names] for part, names in listed.items()}
    return listed


def _tfds_name(name: str) -> str:
    """`Greek/character01`, as published, is `Greek_0` in TFDS."""
    alphabet, character = name.split("/")
    return f"{alphabet}_{int(character.removeprefix('character')) - 1}"
