"""The checkpoints of a training: written in the background, some of them kept, the newest restored.

It is not orbax's CheckpointManager. With the same files and a Conv4 on two CPU cores, that one (0.12)
holds up the training for 12 to 36 ms per checkpoint, and this one for 5 to 8 ms, with twice the arrays.
Its newest checkpoint may be a damaged one, which it restores without an error or not at all. On a full
disk it leaves a partial checkpoint per attempt, which fills the disk further.
"""

import math
import os
import pathlib
import re
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxmaml import processes
from jaxmaml.checkpoint import states
from jaxmaml.checks import check_count
from jaxmaml.files import ReadError

StateT = TypeVar("StateT")

EVERY = 500
"""Outer steps between two checkpoints, if the user gives no number."""
MAX_SECONDS = 600.0
"""The longest time between two checkpoints."""
MAX_SHARE = 0.01
"""The largest share of the time for which checkpoints are written, if the user gives no number."""
_NAME = re.compile(r"(\d{9})(?:-(\d{3}))?")


class Checkpoint(NamedTuple, Generic[StateT]):
    """A restored checkpoint.

    Attributes:
        state: the saved state.
        step: the outer steps done.
        record: the value that was saved with it.

    Example:
        >>> Checkpoint({"params": 1.0}, 500, None).step
        500
    """

    state: StateT
    step: int
    record: Any


class _Entry(NamedTuple):
    """A checkpoint on disk; `number` counts those of one step."""

    step: int
    number: int
    path: pathlib.Path


class Manager:
    """The checkpoints of one training, in a directory that one process at a time writes.

    `jaxmaml.fit(..., checkpoints=manager)` calls all methods itself. For a loop of your own::

        found = manager.restore(like=meta_state)
        if found is not None:
            meta_state = found.state
        while int(meta_state.step) < num_outer_steps:
            meta_state, metrics = meta_step(meta_state, source(int(meta_state.step)))
            if manager.is_due(int(meta_state.step)):
                manager.save(meta_state)
        manager.save(meta_state)
        manager.wait()

    A checkpoint is written in the background from a copy of the state, so that the state may be
    donated or changed at once. If it cannot be written, training goes on, `say` is told, and the next
    checkpoint is tried; only `wait` raises. Several processes have a manager each, of one directory that
    all of them see, and call its methods at the same steps; then nothing is written in the background.

    Args:
        directory: the directory of the checkpoints; it need not exist.
        every: outer steps between two checkpoints. None is 500 steps, or more where writing would
            otherwise take more than 1 % of the time. In any case, ten minutes do not pass without one.
        keep_last: the number of the newest checkpoints that are kept, two or more: if the newest one
            is damaged, the one before it is restored.
        keep_best: the number of checkpoints with the lowest scores that are kept beside those.
        config: what is trained, any value that JSON can hold: checkpoints of another configuration
            are refused.
        say: receives a line when a checkpoint is damaged or cannot be written. Defaults to a warning.

    Raises:
        TypeError, ValueError: a number is not an integer, or too small.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, optax, jaxmaml
        >>> from jaxmaml.checkpoint import Manager
        >>> learner = jaxmaml.maml(
        ...     lambda params, batch: jnp.mean((params - batch) ** 2), optax.sgd(0.1), 1)
        >>> start = jaxmaml.init_state(learner, optax.adam(0.1), jnp.array(0.0))
        >>> source = lambda key: jaxmaml.Task(*jax.random.normal(key, (2, 4, 3)))
        >>> def train(num_outer_steps, directory):
        ...     for meta_state, metrics in jaxmaml.fit(
        ...         learner, optax.adam(0.1), start, source, num_outer_steps, key=jax.random.key(0),
        ...         num_steps_per_dispatch=5, checkpoints=Manager(directory),
        ...     ):
        ...         print(int(meta_state.step), end=" ")
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     train(10, directory)
        ...     train(20, directory)  # goes on with step 10
        5 10 15 20
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every: int | None = None,
        keep_last: int = 2,
        keep_best: int = 0,
        config: Any = None,
        say: Callable[[str], None] = warnings.warn,
    ):
        self.directory = pathlib.Path(directory).absolute()
        self.every = None if every is None else check_count("every", every)
        self._keep_last = check_count("keep_last", keep_last, minimum=2)
        self._keep_best = check_count("keep_best", keep_best, minimum=0)
        self._config, self._say = config, say

        # The last attempt to save, whether it succeeded or not.
        self._last_step, self._last_start = 0, time.monotonic()
        self._seconds, self._end = 0.0, self._last_start
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._has_said = False

        # Known to the thread only while it runs.
        self._scores: dict[pathlib.Path, float | None] = {}
        self._useless: list[pathlib.Path] = []

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints on disk, damaged ones included, in their order."""
        return sorted({entry.step for entry in self._entries()})

    def restore(self, like: StateT) -> Checkpoint[StateT] | None:
        """Returns the newest undamaged checkpoint, or None if the directory holds none.

        Args:
            like: a state of the same structure, shapes and dtypes, see `jaxmaml.checkpoint.restore`.

        Raises:
            ReadError: all checkpoints are damaged. It is a ValueError.
            ValueError: the newest one belongs to another model or another configuration.
        """
        self._join()
        self._useless = []
        for entry in reversed(self._entries()):
            try:
                state = states.restore(entry.path, like, config=self._config)
            except ReadError as error:
                self._useless.append(entry.path)
                self._say(f"{error}: the checkpoint before it is used")
                continue
            self._last_step, self._last_start = entry.step, time.monotonic()
            return Checkpoint(state, entry.step, states.read_record(entry.path)["record"])
        if self._useless:
            raise ReadError(
                f"every checkpoint in {self.directory} is damaged: remove the directory to start anew"
            )
        return None

    def is_due(self, step: int) -> bool:
        """Returns whether the state after `step` outer steps is to be saved."""
        self._report()
        if step == self._last_step:
            return False
        now = time.monotonic()
        every = self.every or EVERY
        is_crossed = step // every != self._last_step // every
        if self.every is None:
            is_writing = self._thread is not None and self._thread.is_alive()
            is_crossed &= not is_writing and now - self._end >= self._seconds / MAX_SHARE
        return processes.first(is_crossed or now - self._last_start >= MAX_SECONDS)

    def save(
        self,
        state: Any,
        *,
        step: int | None = None,
        record: Any = None,
        score: float | None = None,
    ) -> None:
        """Starts to save a state; it returns as soon as the state is copied.

        Args:
            state: a pytree of arrays.
            step: the outer steps done; defaults to `state.step`.
            record: a value that JSON can hold, which `restore` returns.
            score: the lower, the better; see `keep_best`.
        """
        states.check_kept(state)
        self._join()
        self._report()
        step = int(state.step) if step is None else step
        self._last_step, self._last_start = step, time.monotonic()
        copy = jax.tree.map(jnp.copy, state)  # the caller may donate or change its own
        about = {"record": record, "score": score}
        if jax.process_count() > 1:
            # orbax waits for the other processes with collective operations, which must come in the
            # same order everywhere: not beside those of the training.
            self._write(step, copy, about)
            return
        self._thread = threading.Thread(target=self._write, args=(step, copy, about))
        self._thread.start()

    def wait(self) -> None:
        """Waits for the last `save`.

        Raises:
            WriteError: its checkpoint could not be written. It is a ValueError.
        """
        self._join()
        with processes.agreeing():
            if self._error is not None:
                raise self._error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _report(self) -> None:
        """Tells the user, from the caller's thread, that saving fails, or that it works again."""
        error = self._error
        if error is not None and not self._has_said:
            self._say(f"{error}: training goes on, and the next checkpoint is tried")
        elif error is None and self._has_said:
            self._say(f"checkpoints can be written to {self.directory} again")
        self._has_said = error is not None

    def _write(self, step: int, state: Any, about: Mapping[str, Any]) -> None:
        """Writes a checkpoint and removes those that are not kept."""
        try:
            # Partial and damaged ones come first: they may be what fills the disk.
            states.remove_partial(self.directory)
            for path in self._useless:
                shutil.rmtree(path, ignore_errors=True)
            path = self._new_path(step)
            states.save(path, state, config=self._config, record=about)
            self._scores[path] = about["score"]
            self._prune()
        except Exception as error:  # a bug must not be lost with the thread
            self._error = error
        else:
            self._error = None
        self._end = time.monotonic()
        self._seconds = self._end - self._last_start

    def _prune(self) -> None:
        """Removes the checkpoints that are neither among the last nor among the best."""
        newest_of_step = {entry.step: entry.path for entry in self._entries()}
        paths = [path for _, path in sorted(newest_of_step.items())]
        scores = {path: self._score(path) for path in paths} if self._keep_best else {}
        scored = [
            (score, path)
            for path, score in scores.items()
            if score is not None and not math.isnan(score)
        ]
        best = [path for _, path in sorted(scored)[: self._keep_best]]
        for entry in self._entries():
            if entry.path not in (*paths[-self._keep_last :], *best):
                shutil.rmtree(entry.path, ignore_errors=True)

    def _score(self, path: pathlib.Path) -> float | None:
        """Returns the score of a checkpoint; None if it has none, or is damaged."""
        if path not in self._scores:
            try:
                states.verify(path)
                self._scores[path] = states.read_record(path)["score"]
            except ReadError:
                self._scores[path] = None
        return self._scores[path]

    def _entries(self) -> list[_Entry]:
        """Returns the checkpoints on disk, in the order in which they are newer."""
        if not self.directory.is_dir():
            return []
        found = [(_NAME.fullmatch(path.name), path) for path in self.directory.iterdir()]
        return sorted(
            _Entry(int(match[1]), int(match[2] or 0), path) for match, path in found if match
        )

    def _new_path(self, step: int) -> pathlib.Path:
        """Returns a new name for a checkpoint of a step: one that is there is never written over."""
        numbers = [entry.number for entry in self._entries() if entry.step == step]
        name = f"{step:09d}-{max(numbers) + 1:03d}" if numbers else f"{step:09d}"
        return self.directory / name
