"""The event files of TensorBoard, written from the rows of metrics.jsonl; needs tensorboardX.

TensorBoard shows each run of a directory under its label. A run that is continued keeps the events of
the steps that it keeps, so that no step is in its file twice. If a file lacks any of them, because it
was damaged or is new, it is written again from metrics.jsonl.
"""

import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import masked_crc32c

from jaxmaml.files import WriteError, atomic_write

NAME = "events.out.tfevents.0"
"""The name of the file of a run; TensorBoard reads files with "tfevents" in their name."""
TRAINING = ("loss", "query_loss", "grad_norm")
"""The metrics of an outer step that are written."""
_HEADER, _FOOTER = 12, 4
"""The bytes before and after the contents of a record."""


class EventFiles:
    """Receives the rows of a `Recorder`, and writes them to one file per run.

    What cannot be written, for example because the disk is full, is left out: metrics.jsonl has it.

    Args:
        directory: where the folders of the runs are.
        metric: the name of the validation score.
        say: receives a line when events cannot be written.
        clock: the time in seconds, for the steps per second.
    """

    def __init__(
        self,
        directory: Path,
        metric: str,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.directory, self.metric, self._say, self._clock = directory, metric, say, clock
        self._last: dict[str, float] = {}
        self._has_failed = False

    def path(self, label: str) -> Path:
        """Returns the file of a run."""
        return self.directory / label / NAME

    def __call__(self, rows: Sequence[dict[str, Any]]) -> None:
        for label in dict.fromkeys(row["label"] for row in rows):
            own = [row for row in rows if row["label"] == label]
            events = [self._event(row) for row in own] + self._speed(label, own)
            if not self._has_failed:
                self._append(self.path(label), events)

    def cut(
        self, label: str, rows: Sequence[dict[str, Any]], is_kept: Callable[[dict[str, Any]], bool]
    ) -> None:
        """Removes the events of the rows that were removed from metrics.jsonl.

        Args:
            label: the run.
            rows: its rows that were kept.
            is_kept: whether a row with these keys is kept.

        Raises:
            WriteError: the file cannot be written.
        """
        path = self.path(label)
        found = [event for event in _read(path) if event.HasField("summary")]
        kept = [event for event in found if is_kept(_row_of(label, event))]
        if _steps(kept) != sorted((row["step"], "loss" in row) for row in rows):
            kept = [self._event(row) for row in rows]
        if rows:
            with atomic_write(path) as file:
                file.write(_records([_version(), *kept]))
        else:
            path.unlink(missing_ok=True)

    def _append(self, path: Path, events: Iterable[Event]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab", buffering=0) as file:
                data = _records(events if file.tell() else [_version(), *events])
                if file.write(data) < len(data):
                    raise OSError("the disk is full")
        except OSError as error:
            self._has_failed = True
            self._say(
                f"{WriteError(f'{path} cannot be written: {error}')}: training goes on without it, "
                "and writes it again when it is continued"
            )

    def _event(self, row: dict[str, Any]) -> Event:
        """Returns the event of a row of metrics.jsonl."""
        if "loss" in row:
            return _scalars(row["step"], {f"training/{name}": row[name] for name in TRAINING})
        values = {
            f"validation/{self.metric} after {i} inner step{'s' * (i != 1)}": value
            for i, value in enumerate(row["val_per_step"])
        }
        return _scalars(row["step"], values)

    def _speed(self, label: str, rows: Sequence[dict[str, Any]]) -> list[Event]:
        """Returns the event of the steps per second since the rows before, if there were any."""
        steps = [row["step"] for row in rows if "loss" in row]
        if not steps:
            return []
        now, before = self._clock(), self._last.get(label)
        self._last[label] = now
        if before is None or now <= before:
            return []
        return [_scalars(steps[-1], {"training/steps per second": len(steps) / (now - before)})]


def _scalars(step: int, values: dict[str, float | None]) -> Event:
    found = [
        Summary.Value(tag=tag.replace(" ", "_"), simple_value=np.nan if value is None else value)
        for tag, value in values.items()
    ]
    return Event(wall_time=time.time(), step=step, summary=Summary(value=found))


def _version() -> Event:
    """Returns the event that a file begins with."""
    return Event(wall_time=time.time(), file_version="brain.Event:2")


def _row_of(label: str, event: Event) -> dict[str, Any]:
    """Returns the keys by which it is decided whether a row is kept."""
    is_training = event.summary.value[0].tag.startswith("training/")
    return {"label": label, "step": event.step} | ({"loss": None} if is_training else {})


def _steps(events: Iterable[Event]) -> list[tuple[int, bool]]:
    """Returns (step, whether it is of training) of the events that come from rows."""
    tags = [(event.step, event.summary.value[0].tag) for event in events]
    return sorted(
        (step, tag.startswith("training/")) for step, tag in tags if not tag.endswith("per_second")
    )


def _records(events: Iterable[Event]) -> bytes:
    """Returns events in the format of TensorFlow's record files."""
    found = []
    for event in events:
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        checks = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        found.append(length + checks[0] + data + checks[1])
    return b"".join(found)


def _read(path: Path) -> Iterator[Event]:
    """Yields the events of a file, up to the first one that is not whole."""
    data = path.read_bytes() if path.is_file() else b""
    start = 0
    while start + _HEADER <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        end = start + _HEADER + length + _FOOTER
        record = data[start + _HEADER : end - _FOOTER]
        if end > len(data) or data[end - _FOOTER : end] != struct.pack("<I", masked_crc32c(record)):
            return
        yield Event.FromString(record)
        start = end
