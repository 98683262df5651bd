"""Filters what native code writes: the reports of JAX's processes about each other.

If a process of several ends, JAX ends the others with `abort`, after a page of reports and addresses in
its library. Python cannot catch that. So native output goes through another process, this file run as a
script, which outlives this one: it drops these reports and says in a sentence what they mean.
"""

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

LOST = (
    "another process of this command ended or cannot be reached: start all of them again; with the same "
    "--out they go on from the last checkpoint"
)
TWICE = "two processes have the same --process-id, or one was started again while the others ran"
LATE = "not all processes joined in time: start as many as --num-processes says"
_FATAL = "JAX distributed service detected fatal errors"
_REPORTS = re.compile(
    r"^\[Gloo\]|coordination_service|CoordinationService|preemption_sync_manager|distributed_runtime|"
    r"^Additional GRPC error|^This suggests that the workers|^:UNKNOWN|^\s*$|^RPC: /xla|"
    r"^Barrier result|^WARNING: All log messages before"
)
"""Lines about other processes."""


def filter_output() -> None:
    """Passes native output on to a process that filters it; Python's own goes where it went."""
    streams: list[Any] = [sys.stdout, sys.stderr]
    kept = []
    for stream in streams:
        stream.flush()
        kept.append(os.dup(stream.fileno()))
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=kept[1], stderr=kept[1],
        start_new_session=True,  # a signal of the terminal does not end it
    )  # fmt: skip
    assert process.stdin is not None
    for number in (1, 2):
        os.dup2(process.stdin.fileno(), number)
    process.stdin.close()
    process.returncode = 0  # nobody waits for it: it ends with the last writer
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(
            os.fdopen(number, "wb"), stream.encoding, stream.errors, line_buffering=True
        )
        for number, stream in zip(kept, streams, strict=True)
    )


def kept_lines(lines: Iterable[str]) -> Iterable[str]:
    """Yields the lines that are not about other processes, and a sentence if these ended this one.

    >>> list(kept_lines(["[Gloo] Rank 0 is connected", "out of memory"]))
    ['out of memory']
    """
    reports, is_lost = [], False
    for line in lines:
        is_lost |= _FATAL in line
        if is_lost or _REPORTS.search(line):
            reports.append(line)
        else:
            yield line
    if is_lost:
        text = "".join(reports)
        is_twice = "different incarnation" in text
        reason = TWICE if is_twice else LATE if "RegisterTask" in text else LOST
        yield f"error: {reason}\n"


if __name__ == "__main__":
    sys.stdin.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    for kept_line in kept_lines(sys.stdin):
        sys.stderr.write(kept_line)
        sys.stderr.flush()
