"""Stages of long work: the library says what it does and how far it is, and whoever listens shows it.

The library prints nothing. A listener is called within `listening`, and in its thread only:

    with stages.listening(lambda stage: print(stage.what, stage.done, stage.total)):
        images = datasets.load("omniglot", data_dir)
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import TypeAlias


@dataclasses.dataclass(eq=False)
class Stage:
    """A piece of work that may take more than a second.

    Attributes:
        what: what is done, such as "decoding images".
        total: how many things there are to do; None if that is not known.
        done: how many of them are done.
        is_over: whether the work has ended, with or without an error.

    Example:
        >>> Stage("decoding images", 100).done
        0
    """

    what: str
    total: int | None
    done: int = 0
    is_over: bool = False


Listener: TypeAlias = Callable[[Stage], None]
"""Is called when a stage begins, when something of it is done, and when it is over."""

_listener: contextvars.ContextVar[Listener | None] = contextvars.ContextVar("stages", default=None)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Calls a listener with every stage of the work in the block.

    Args:
        listener: receives the stage, which is the same object from its begin to its end.

    Example:
        >>> with listening(lambda stage: print(stage.what, stage.done, stage.total)):
        ...     with stage("counting", 2) as advance:
        ...         advance(2)
        counting 0 2
        counting 2 2
        counting 2 2
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextlib.contextmanager
def stage(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Makes the block a stage, and gives a function that adds to what is done.

    Args:
        what: what is done.
        total: how many things there are to do; None if that is not known.

    Example:
        >>> with stage("decoding images", 2000) as advance:  # nobody listens
        ...     for _ in range(2):
        ...         advance(1000)
    """
    listener, found = _listener.get(), Stage(what, total)
    if listener is None:
        yield lambda num: None
        return

    def advance(num: int) -> None:
        found.done += num
        if total is not None:
            found.done = min(found.done, total)  # the last batch may have more than is asked for
        listener(found)

    listener(found)
    try:
        yield advance
    finally:
        found.is_over = True
        listener(found)
