"""Messages of a command on standard error: one line each, in any encoding."""

import contextlib
import io
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

MAX_WORD = 200
"""The most characters of a word in a message."""


def one_line(message: str) -> str:
    """Returns a message as one line, without the middle of words that are very long."""
    shorten = lambda word: f"{word[0][:60]}... ({len(word[0]):,} characters)"
    return re.sub(rf"\S{{{MAX_WORD},}}", shorten, " ".join(message.split()))


@contextlib.contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Shows each warning as one line, without the place in the code."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"warning: {one_line(str(message))}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def accept_all_characters() -> None:
    """Lets the output replace what its encoding does not have, as ASCII has no plus-minus sign."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
