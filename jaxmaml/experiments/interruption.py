"""Lets the signals of a terminal and of a scheduler end a run at a point from which it continues.

One process alone is interrupted at once. Of several, each notes a signal, and `check` raises it in all
of them at the same point: a process that left the others would leave them waiting.
"""

import contextlib
import functools
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import jax

from jaxmaml import processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_noted: list[int] = []
"""The signals that were received and not raised yet."""


class Interrupted(KeyboardInterrupt):
    """The process was asked to end.

    Attributes:
        code: its exit code, as a shell gives it: 130 for SIGINT, 143 for SIGTERM.

    >>> Interrupted(signal.SIGTERM).code
    143
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raises `Interrupted` at the first signal within the block, and ends the process at the second.

    A signal that is ignored, as SIGINT in the background of a shell script, stays ignored. Outside the
    main thread, which alone receives signals, the block is as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    receive = functools.partial(_receive, [])
    handlers = {number: signal.signal(number, receive) for number in caught}
    watched, written = socket.socketpair()
    written.setblocking(False)
    before = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(watched, caught), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        written.close()  # which ends the thread


def check() -> None:
    """Raises `Interrupted` if one of several processes has received a signal; all must call it."""
    if jax.process_count() == 1:
        return
    found = [number for noted in processes.gathered(list(_noted)) for number in noted]
    if found:
        _noted.clear()
        raise Interrupted(found[0])


def _receive(received: list[int], number: int, frame: Any) -> None:
    """Raises, or notes, the first signal; a second one must not raise while the first is handled."""
    received.append(number)
    if len(received) > 1:
        os._exit(128 + number)
    if jax.distributed.is_initialized():  # `process_count` would start JAX
        _noted.append(number)
    else:
        raise Interrupted(number)


def _watch(watched: socket.socket, caught: list[int]) -> None:
    """Ends the process at the second signal, also while the main thread is within a computation."""
    num_received = 0
    with watched:
        while numbers := watched.recv(64):
            for number in numbers:
                num_received += number in caught
                if num_received > 1:
                    os._exit(128 + number)
