"""Exit codes, and mistakes of the user as one line."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

SUCCESS, STOPPED, MISTAKE, BUG, LOST, INTERRUPTED = 0, 1, 2, 70, 75, 130
"""The exit codes; 70 and 75 are EX_SOFTWARE and EX_TEMPFAIL of sysexits.h."""


class UserError(Exception):
    """Something that the user can mend. Its text is all that is shown."""


def say(line: str) -> None:
    """Prints a line on standard error. If nobody can read it, the exit code still says how it went."""
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        drop(sys.stderr)


def drop(stream: Any) -> None:
    """Lets go of what a stream could not write: it could not at the end of the process either."""
    with contextlib.suppress(OSError, ValueError):  # an output that is not a file, or is closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns the errors of a preparation into one line.

    It does not surround training: there a ValueError is a bug, and keeps its traceback, except where
    a file cannot be read or written.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UserError(str(error)) from None


def check_matplotlib() -> None:
    """Raises an error for the user if matplotlib refuses its settings, before anything is drawn."""
    try:
        import matplotlib  # noqa: F401
    except ValueError as error:
        name = os.environ.get("MPLBACKEND")
        raise UserError(f"matplotlib cannot be loaded with MPLBACKEND={name!r}: {error}") from None
