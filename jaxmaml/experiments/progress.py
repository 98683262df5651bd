"""The progress of commands, on standard error: bars on a terminal, lines now and then elsewhere."""

import contextlib
import dataclasses
import io
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, Protocol

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from jaxmaml import processes, stages
from jaxmaml.experiments.domains import Metric
from jaxmaml.stages import Stage

BAR_SECONDS, LINE_SECONDS = 0.5, 5.0
"""A stage that takes less time has no bar, or no line."""
SECONDS_PER_LINE = 30.0
"""The time between two lines about the same work."""
NARROW = 100
"""On a terminal with fewer columns, bars are short."""


@dataclasses.dataclass
class Status:
    """The state of a run at a moment.

    Attributes:
        label: the name of the run.
        total: its outer steps.
        metric: the score of validations.
        phase: what happens if it is not training, such as "compiling".
        completed: outer steps that are done.
        rate: outer steps per second; None if it is not known yet.
        loss: the query loss; None if it is not known yet.
        score: the last validation score; None if it is not known yet.
        skipped: outer steps that were skipped.
        left: seconds that are left; None if that is not known yet.
    """

    label: str
    total: int
    metric: Metric
    phase: str = ""
    completed: int = 0
    rate: float | None = None
    loss: float | None = None
    score: float | None = None
    skipped: int = 0
    left: float | None = None

    @property
    def speed(self) -> str:
        """The steps per second, in words."""
        return "" if self.rate is None else f"{self.rate:.3g} steps/s"

    @property
    def news(self) -> str:
        """The phase, the loss and the score, in words."""
        found = [self.phase] if self.phase else []
        if self.loss is not None:
            found.append(f"loss {self.loss:.3g}")
        if self.score is not None:
            found.append(f"validation {self.metric.short(self.score)}")
        if self.skipped:
            found.append(f"{self.skipped:,} skipped")
        return ", ".join(found)


class View(Protocol):
    """Shows runs and stages."""

    def run(self, status: Status) -> None:
        """Shows a run as it is now."""
        ...

    def stage(self, stage: Stage, seconds: float) -> None:
        """Shows a stage that began some seconds ago."""
        ...


class Display:
    """Shows what a command does and how far it is, while it is the context of a block.

    Within the block it listens to the stages of the library, too.

    Args:
        file: where it writes; defaults to standard error.
        clock: the time in seconds.

    Attributes:
        console: prints lines above the bars.
    """

    def __init__(self, file: IO[str] | None = None, clock: Callable[[], float] = time.monotonic):
        # What replaces standard error later, for example to silence a library, does not silence this.
        # A process that was started without standard error shows nothing.
        out: IO[str] = file or sys.stderr or io.StringIO()
        # FORCE_COLOR, which notebooks and CI set, asks for colors in a log and not for moving bars.
        self.console = _Console(file=out, force_terminal=out.isatty())
        self._clock = clock
        self._view: View = _Lines(self.console, clock)
        self._begins: dict[Stage, float] = {}
        self._lock = threading.RLock()
        self._open = contextlib.ExitStack()

    @classmethod
    def of_process(cls) -> "Display":
        """Returns the display of a process: of several, only process 0 shows anything."""
        return cls() if processes.is_first() else cls(io.StringIO())

    def __enter__(self) -> "Display":
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._view = self._open.enter_context(_bars(self.console))
        else:
            self._open.enter_context(_ticking(self.tick))
        self._open.enter_context(stages.listening(self._on_stage))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def run(self, label: str, total: int, *, metric: Metric) -> Callable[..., None]:
        """Returns a function that receives news of a run, as fields of `Status`, and shows them."""
        status, before, begin = Status(label, total, metric), None, None

        def show(**news: Any) -> None:
            nonlocal before, begin
            for name, value in news.items():
                setattr(status, name, value)
            # The time left is that of all work, validations included, but for the first steps: they
            # wait until programs are compiled.
            if before is None and "completed" in news:
                before = status.completed
            elif begin is None and before is not None and status.completed > before:
                begin = self._clock(), status.completed
            elif begin is not None and status.completed > begin[1]:
                seconds = (self._clock() - begin[0]) / (status.completed - begin[1])
                status.left = seconds * (total - status.completed)
            self._view.run(status)

        return show

    def say(self, line: str) -> None:
        """Prints a line above the bars."""
        # Its reader may be gone, or the disk of a log full, which must not end hours of work.
        with contextlib.suppress(OSError, ValueError):
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def tick(self) -> None:
        """Shows all stages again: the next thing of one may take minutes."""
        with self._lock:
            for stage, begin in self._begins.items():
                self._view.stage(stage, self._clock() - begin)

    def _on_stage(self, stage: Stage) -> None:
        with self._lock:
            begin = self._begins.setdefault(stage, self._clock())
            self._view.stage(stage, self._clock() - begin)
            if stage.is_over:
                del self._begins[stage]


class _Console(Console):
    """A console that falls silent when its reader is gone: rich's would end the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


@contextlib.contextmanager
def _ticking(tick: Callable[[], None]) -> Iterator[None]:
    """Calls a function about once per second during the block."""
    end = threading.Event()

    def run() -> None:
        while not end.wait(1.0):
            tick()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


@contextlib.contextmanager
def _bars(console: Console) -> Iterator["_Bars"]:
    with _Progress(console) as progress:
        yield _Bars(progress)


class _Progress(Progress):
    """One line per run or stage, and below them the news of the run."""

    def __init__(self, console: Console):
        self.news = ""
        super().__init__(
            TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=10 if console.width < NARROW else 40),
            TextColumn("{task.fields[count]}", justify="right", table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[rate]}", table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
            console=console,
        )  # fmt: skip

    def get_renderables(self) -> Iterable[RenderableType]:
        # A stage becomes visible by its age, also if nothing of it is done yet.
        shown = [t for t in self.tasks if t.fields["is_run"] or (t.elapsed or 0) >= BAR_SECONDS]
        yield self.make_tasks_table(shown)
        if self.news:
            yield Text(f"  {self.news}", style="dim", no_wrap=True, overflow="ellipsis")


class _Bars:
    """A `View` of bars."""

    def __init__(self, progress: _Progress):
        self._progress = progress
        self._runs: dict[str, TaskID] = {}
        self._stages: dict[Stage, TaskID] = {}

    def run(self, status: Status) -> None:
        if status.label not in self._runs:
            self._runs[status.label] = self._add(status.label, status.total, is_run=True)
        is_done = status.completed == status.total and not status.phase
        self._progress.news = "" if is_done else status.news
        self._progress.update(
            self._runs[status.label], completed=status.completed, rate=status.speed,
            count=f"{status.completed:,}/{status.total:,}",
            left="" if not status.left else f"{_clock_text(status.left)} left",
        )  # fmt: skip

    def stage(self, stage: Stage, seconds: float) -> None:
        if stage not in self._stages:
            self._stages[stage] = self._add(stage.what, stage.total, is_run=False)
        task = self._stages[stage]
        if stage.is_over:
            self._progress.remove_task(self._stages.pop(stage))
            return
        count = f"{stage.done:,}" + (f"/{stage.total:,}" if stage.total is not None else "")
        left = _left(stage, seconds)
        self._progress.update(
            task, completed=stage.done, total=stage.total,
            count=count if stage.done or stage.total else "",
            left="" if left is None else f"{_clock_text(left)} left",
        )  # fmt: skip

    def _add(self, description: str, total: int | None, *, is_run: bool) -> TaskID:
        return self._progress.add_task(
            escape(description), total=total, rate="", left="", count="", is_run=is_run
        )


class _Lines:
    """A `View` of lines, without control characters."""

    def __init__(self, console: Console, clock: Callable[[], float]):
        self._console, self._clock = console, clock
        self._phases: dict[str, str] = {}
        self._last: dict[str, float] = {}

    def run(self, status: Status) -> None:
        before = self._phases.get(status.label)
        self._phases[status.label] = status.phase
        if status.phase != before and status.phase not in ("", "validating"):
            self._print(status.label, f"{status.label}: {status.phase}")
        elif self._is_due(status.label) and status.completed:
            step = f"outer step {status.completed:,} of {status.total:,}"
            left = "" if not status.left else f"{_clock_text(status.left)} left"
            parts = [step, status.speed, left, status.news]
            self._print(status.label, f"{status.label}: {', '.join(filter(None, parts))}")

    def stage(self, stage: Stage, seconds: float) -> None:
        if stage.is_over or seconds < LINE_SECONDS:
            return
        # Work that is done again and again, such as scoring, has no more lines than long work.
        if stage.what not in self._last or self._is_due(stage.what):
            of = "" if stage.total is None else f" of {stage.total:,}"
            count = f": {stage.done:,}{of}" if stage.done else ""
            left = _left(stage, seconds)
            after = "" if left is None else f", {_clock_text(left)} left"
            self._print(stage.what, f"{stage.what}{count}{after}")

    def _is_due(self, work: str) -> bool:
        last = self._last.setdefault(work, self._clock())
        return self._clock() - last >= SECONDS_PER_LINE

    def _print(self, work: str, line: str) -> None:
        self._last[work] = self._clock()
        with contextlib.suppress(OSError, ValueError):
            print(line, file=self._console.file, flush=True)


def _left(stage: Stage, seconds: float) -> float | None:
    """Returns the seconds that are left of a stage; None if that is not known."""
    if not stage.done or not stage.total or stage.done >= stage.total:
        return None
    return seconds / stage.done * (stage.total - stage.done)


def _clock_text(seconds: float) -> str:
    """Returns a time as hours, minutes and seconds.

    >>> _clock_text(3723.4)
    '1:02:03'
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
