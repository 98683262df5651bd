"""The command line, `jaxmaml`: from words to a command, and from errors to a line and an exit code.

Exit codes: 0 success; 1 training stopped at a loss or a gradient that is not finite; 2 a wrong
argument, or something that the user can mend, such as a full disk; 70 a bug, with its traceback; 75 or
134 another process of a training is gone; 130 interrupted by SIGINT, 143 by SIGTERM. An interrupted
training is saved first.
"""

import contextlib
import functools
import importlib.metadata
import io
import itertools
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from jaxmaml import files
from jaxmaml.checks import check_known
from jaxmaml.commands import data, doctor, trained, training
from jaxmaml.commands.mistakes import (
    BUG,
    INTERRUPTED,
    LOST,
    MISTAKE,
    STOPPED,
    SUCCESS,
    UserError,
    drop,
    say,
    user_errors,
)
from jaxmaml.experiments import messages

MAX_ARGUMENT = 1000
"""The most characters of an argument."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
        arguments: the words of the command line after "jaxmaml"; defaults to those of the process.
    """
    commands: dict[str, Callable[..., int]] = {
        "compare": training.compare,
        "train": training.train,
        "evaluate": trained.evaluate,
        "adapt": trained.adapt,
        "report": trained.report,
        "presets": doctor.list_presets,
        "data": data.data,
        "doctor": doctor.doctor,
    }
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    messages.accept_all_characters()
    if arguments == ["--version"]:
        print(f"jaxmaml {importlib.metadata.version('jaxmaml')}")
        return SUCCESS
    try:
        with messages.warnings_as_lines():
            return _run(arguments, commands)
    except KeyboardInterrupt as stop:
        say("interrupted")
        return getattr(stop, "code", INTERRUPTED)
    except SystemExit as stop:
        # tyro stops at a mistake in the options, and rich with 1 at an output that is closed.
        if stop.code == STOPPED:
            return MISTAKE
        raise
    except Exception as error:
        return _report(error)


def _run(arguments: list[str], commands: dict[str, Callable[..., int]]) -> int:
    """Runs the command that the arguments name, and returns its exit code."""
    _check_lengths(arguments)
    # The command runs outside tyro, which takes a ValueError for a mistake in the options.
    code = _command(arguments, commands)()
    sys.stdout.flush()
    return code


def _command(arguments: list[str], commands: dict[str, Callable[..., int]]) -> Callable[[], int]:
    """Returns the command that the arguments name, with its options; a mistake is one line."""
    named = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    with user_errors():
        if named:
            check_known("command", named, commands)
    deferred = {name: _deferred(command, name == named) for name, command in commands.items()}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return _parsed(arguments, deferred)
    except SystemExit as stop:
        if stop.code == MISTAKE:
            raise UserError(_mistake(said.getvalue(), arguments, deferred)) from None
        sys.stderr.write(said.getvalue())
        raise


def _parsed(
    arguments: Sequence[str], commands: dict[str, Callable[..., Callable[[], int]]]
) -> Callable[[], int]:
    return tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="jaxmaml",
        description="Gradient-based meta-learning in JAX.",
        args=arguments,
        config=(
            tyro.conf.CascadeSubcommandArgs,
            tyro.conf.OmitArgPrefixes,
            tyro.conf.OmitSubcommandPrefixes,
            tyro.conf.DisallowNone,
        ),
    )


def _mistake(
    said: str, arguments: Sequence[str], commands: dict[str, Callable[..., Callable[[], int]]]
) -> str:
    """Returns what tyro said of a mistake as one line, with the option that may have been meant."""
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments))
    mistake = messages.usage_error(said)
    if option := messages.unknown_option(mistake):
        mistake = messages.nearest_option(option, _options(words, commands))
    page = " ".join(["jaxmaml", *words[: 2 if words[:1] == ["data"] else 1], "--help"])
    return f"{mistake}{' See' if mistake.endswith('?') else '; see'} {page}"


def _options(
    words: Sequence[str], commands: dict[str, Callable[..., Callable[[], int]]]
) -> list[str]:
    """Returns the options on the help page of the command that some words name."""
    page = io.StringIO()
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        _parsed([*words, "--help"], commands)
    return sorted(set(re.findall(r"--[a-z][a-z-]+", page.getvalue())) - {"--help"})


def _report(error: Exception) -> int:
    """Prints an error, and returns the exit code: a line for what the user can mend, or a bug."""
    if (lost := _lost(error)) is not None:
        say(f"error: {messages.one_line(lost)}")
        os._exit(LOST)  # at the end of the process, JAX would wait for the one that is gone
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        message = f"out of memory; smaller sizes or a smaller chunk_size need less ({error})"
    elif isinstance(error, UserError | files.WriteError | files.ReadError | OSError):
        message = str(error)
    else:
        traceback.print_exception(error)
        say("This is a bug in jaxmaml: please report it.")
        return BUG
    say(f"error: {messages.one_line(message)}")
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        drop(sys.stdout)
    return MISTAKE


def _lost(error: Exception) -> str | None:
    if "jax" not in sys.modules:
        return None
    from jaxmaml.experiments import joining

    return joining.lost(error)


def _check_lengths(arguments: Sequence[str]) -> None:
    for argument in arguments:
        if len(argument) > MAX_ARGUMENT:
            raise UserError(
                f"an argument has {len(argument):,} characters, and the limit is "
                f"{MAX_ARGUMENT:,}: {argument[:60]}..."
            )


def _deferred(command: Callable[..., int], is_named: bool) -> Callable[..., Callable[[], int]]:
    """Returns a function that reads the options of a command and returns what runs it."""

    @functools.wraps(command)
    def parsed(*args: Any, **kwargs: Any) -> Callable[[], int]:
        return functools.partial(command, *args, **kwargs)

    # The list of the commands has their first paragraphs, without the examples.
    if not is_named:
        parsed.__doc__ = (command.__doc__ or "").partition("\n\n")[0]
    return parsed
