"""Writes metrics.jsonl along the runs of a directory."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from jaxmaml.experiments.run_dir import RunDir
from jaxmaml.files import WriteError


class Sink(Protocol):
    """Receives the rows of metrics.jsonl once they are on disk."""

    def __call__(self, rows: Sequence[dict[str, Any]], /) -> None:
        """Receives rows after the ones before."""
        ...

    def cut(
        self, label: str, rows: Sequence[dict[str, Any]], is_kept: Callable[[dict[str, Any]], bool]
    ) -> None:
        """Forgets the rows of a run that are not kept; `rows` are those that are."""
        ...


class NoRecord:
    """Takes the place of a `Recorder` in the processes that write no files."""

    is_written = True

    def __call__(self, rows: Sequence[dict[str, Any]]) -> None: ...
    def cut(self, label: str, num_steps: int, validations: Sequence[int]) -> None: ...
    def finish(self) -> None: ...


@dataclasses.dataclass
class Recorder:
    """Writes rows of metrics, and config.json before them, from the first outer step on.

    Until then it keeps the rows, so that a start that fails leaves no files. While the disk is full it
    keeps them, too.

    Attributes:
        run_dir: the directory to write to.
        config: the contents of config.json.
        is_resumed: whether the directory holds the runs already.
        say: receives a line when rows cannot be written.
        sinks: receive the rows, too.
    """

    run_dir: RunDir
    config: dict[str, Any]
    is_resumed: bool = False
    say: Callable[[str], None] = warnings.warn
    sinks: Sequence[Sink] = ()
    _kept: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    _has_started: bool = False
    _has_failed: bool = False

    @property
    def is_written(self) -> bool:
        """Whether all rows are on disk."""
        return not self._kept

    def __call__(self, rows: Sequence[dict[str, Any]]) -> None:
        self._kept += rows
        if not self._has_started:
            if any("loss" in row for row in self._kept):
                self._start()
            return
        try:
            self.run_dir.append_metrics(self._kept)
        except WriteError as error:
            if not self._has_failed:
                self.say(f"{error}: training goes on, and its rows are kept")
            self._has_failed = True
        else:
            self._has_failed = False
            self._pass_on()

    def cut(self, label: str, num_steps: int, validations: Sequence[int]) -> None:
        """Removes the rows of a run, except those of its first steps and of some validations."""

        def is_kept(row: dict[str, Any]) -> bool:
            if row["label"] != label:
                return True
            return row["step"] < num_steps if "loss" in row else row["step"] in validations

        if self.is_resumed:
            self.run_dir.cut_metrics(is_kept)
            for sink in self.sinks:
                sink.cut(label, self.run_dir.read_metrics(label), is_kept)

    def finish(self) -> None:
        """Writes what was kept, before the results are written.

        Raises:
            WriteError: it cannot be written.
        """
        if not self._has_started:
            self._start()
        elif self._kept:
            self.run_dir.append_metrics(self._kept)
            self._pass_on()

    def _pass_on(self) -> None:
        """Gives the rows, which are on disk now, to the sinks."""
        rows, self._kept = self._kept, []
        for sink in self.sinks:
            sink(rows)

    def _start(self) -> None:
        """Writes the first files, both or none of them."""
        if self.is_resumed:
            self.run_dir.reopen(self.config)
            self.run_dir.append_metrics(self._kept)
        else:
            self._create()
        self._has_started = True
        self._pass_on()

    def _create(self) -> None:
        self.run_dir.create(self.config)
        try:
            self.run_dir.append_metrics(self._kept)
        except WriteError:
            self.run_dir.config.unlink()
            self.run_dir.metrics.unlink(missing_ok=True)
            raise
