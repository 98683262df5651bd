"""Messages of a command on standard error: one line each, in any encoding."""

import contextlib
import io
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from jaxmaml.checks import nearest

_HELP = ("For full helptext", "Argument helptext")
"""The beginnings of what tyro adds to each mistake."""
_SURPLUS = (
    " in jaxmaml( [a-z]+)+ --help",
    r" \(applied to [^)]*\)",
    " Arguments are applied to the directly preceding subcommand, so ordering can matter.",
    r"\. Got errors: [^;]*",
    ", 'None'",
    "'None', ",
)
"""Patterns of words that help nobody: None is what an option has that is not given."""
_TYPES = {"INT": "an integer", "FLOAT": "a number"}
_WORDINGS = (
    (
        r"Error parsing (\S+): no type matching (INT|FLOAT) could be instantiated from \[(.*)\]",
        lambda found: f"{found[1]} must be {_TYPES[found[2]]}; got {found[3]}",
    ),
    (
        r"Missing value for argument '(?:\w+\.)?([\w-]+)'\. Expected \d+ values?",
        lambda found: f"{found[1]} is missing",
    ),
)
"""Messages of tyro as patterns, each with its wording in this package."""
_RULE = re.compile("[│╰╯ ]*[─-]{3,}[│╰╯ ]*")
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
        with contextlib.suppress(OSError, ValueError):  # its reader may be gone
            print(f"warning: {one_line(str(message))}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def usage_error(box: str) -> str:
    """Returns the box that tyro draws around a mistake in the options as one line.

    >>> usage_error("╭─ Title ─╮\\n│ Unrecognized: x │\\n│ ───── │\\n│ Perhaps y │\\n╰────╯")
    'Unrecognized: x; Perhaps y'
    """
    # The first line is the title; lines divide the parts. Where the output takes ASCII only, there are
    # no borders.
    parts: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:
        if _RULE.fullmatch(line):
            parts.append([])
        else:
            parts[-1].append(line.strip("│ "))
    texts = [" ".join(part).strip() for part in parts]
    kept = [text for text in texts if text and not text.startswith(_HELP)]
    said = re.sub("|".join(_SURPLUS), "", one_line("; ".join(kept) or box)).rstrip(".")
    for pattern, wording in _WORDINGS:
        said = re.sub(pattern, wording, said)
    return said


def unknown_option(said: str) -> str | None:
    """Returns the option that a message of `usage_error` calls unrecognized; None for other messages.

    >>> unknown_option("Unrecognized options: --inner-rate, 0.4; Perhaps you meant: --inner-lr FLOAT")
    '--inner-rate'
    """
    found = re.match(r"Unrecognized (?:or misplaced )?options: (--?[\w-]+)", said)
    return found and found[1]


def nearest_option(name: str, options: Sequence[str]) -> str:
    """Returns an unknown option as a mistake, with the option that is spelled most like it.

    >>> nearest_option("--inner-learning-rate", ["--inner-lr", "--outer-lr", "--way"])
    'unknown option --inner-learning-rate; did you mean --inner-lr?'
    """
    near = nearest(name, options, likeness=0.5)
    return f"unknown option {name}" + (f"; did you mean {near}?" if near else "")


def accept_all_characters() -> None:
    """Lets the output replace what its encoding does not have, as ASCII has no plus-minus sign."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
