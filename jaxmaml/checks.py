"""Checks of arguments that many functions share."""

import difflib
import operator
from collections.abc import Iterable
from typing import Any


def check_count(name: str, value: Any, *, minimum: int = 1) -> int:
    """Returns `value` as an int.

    Args:
        name: the name of the argument, for the message.
        value: an integer of any type with `__index__`, NumPy's included; not a bool.
        minimum: the smallest value that is allowed.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: `value` is less than `minimum`.

    Example:
        >>> check_count("way", 5)
        5
    """
    rule = f"{name} must be an integer, {minimum} or more; got {value!r}"
    if isinstance(value, bool):
        raise TypeError(rule)
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(rule) from None
    if number < minimum:
        raise ValueError(rule)
    return number


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`.

    Args:
        name: the name of the argument, for the message.
        value: what was given.
        choices: what is allowed.

    Example:
        >>> check_choice("mode", "reverse", ("forward", "reverse"))
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_known(kind: str, name: str, known: Iterable[str]) -> None:
    """Raises ValueError unless a name is one of those that are known; suggests one that is near.

    Args:
        kind: what is named, for the message.
        name: what was given.
        known: every name.

    Example:
        >>> check_known("learner", "MAML", ["maml", "anil"])
        Traceback (most recent call last):
        ValueError: unknown learner 'MAML': did you mean 'maml'? Known are maml, anil
    """
    known = list(known)
    if name in known:
        return
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f" did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {kind} {name!r}:{hint} Known are {', '.join(known)}")
