"""The progress on a terminal of 80 columns, and in a log file."""

import contextlib
import errno
import io

import pytest
from rich.console import Console
from rich.table import Table

from jaxmaml import stages
from jaxmaml.experiments import progress
from jaxmaml.experiments.domains import METRICS
from jaxmaml.experiments.progress import Display


class Clock:
    """A time that only moves when it is told to."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def log():
    return io.StringIO()


@pytest.mark.parametrize(
    "error", [BrokenPipeError("gone"), OSError(errno.ENOSPC, "full"), ValueError("closed file")]
)
@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_line_that_cannot_be_written_ends_nothing(error, is_terminal, log, monkeypatch):
    monkeypatch.setattr(log, "isatty", lambda: is_terminal)
    display = Display(log)

    def write(text):
        raise error

    monkeypatch.setattr(log, "write", write)
    display.say("warning: the disk is full")
    display.say("and still is")


def test_a_log_has_lines_at_a_sensible_rate(clock, log):
    with Display(log, clock) as display:
        show = display.run("exact", 2000, metric=METRICS["classification"])
        show(phase="compiling")
        show(phase="")
        show(completed=0)
        for done in range(100, 2001, 100):
            clock.now += 10
            show(completed=done, rate=10.0, loss=0.5)
            show(phase="validating")
            show(phase="", score=0.853)
        show(phase="testing")
    lines = log.getvalue().splitlines()
    assert lines[0] == "exact: compiling"
    assert lines[1] == (
        "exact: outer step 300 of 2,000, 10 steps/s, 0:02:50 left, loss 0.5, validation 85.3 %"
    )
    assert lines[-1].startswith("exact: testing")
    assert len(lines) == 2 + 200 // 30
    assert log.getvalue().isprintable() or set(log.getvalue()) - {"\n"} <= set(
        map(chr, range(32, 127))
    )


def test_a_resumed_run_does_not_count_the_steps_that_were_done(clock, log):
    with Display(log, clock) as display:
        show = display.run("exact", 2000, metric=METRICS["regression"])
        show(completed=1000)
        clock.now += 10
        show(completed=1100, rate=10.0, loss=0.5)
        clock.now += 40
        show(completed=1200, rate=2.5, loss=0.5)
    assert "0:05:20 left" in log.getvalue()


def test_the_time_left_is_not_that_of_compiling(clock, log):
    with Display(log, clock) as display:
        show = display.run("exact", 400, metric=METRICS["regression"])
        show(completed=0)
        clock.now += 120
        show(completed=1, rate=20.0, loss=0.5)
        for done in range(101, 400, 100):
            clock.now += 10
            show(completed=done, rate=10.0, loss=0.5)
    assert log.getvalue().splitlines() == [
        "exact: outer step 1 of 400, 20 steps/s, loss 0.5",
        "exact: outer step 301 of 400, 10 steps/s, 0:00:10 left, loss 0.5",
    ]


def test_a_short_stage_has_no_line_and_a_long_one_has(clock, log):
    with Display(log, clock), stages.stage("decoding images", 100) as advance:
        clock.now += 1
        advance(10)
        assert log.getvalue() == ""
        clock.now += 9
        advance(40)
        assert log.getvalue() == "decoding images: 50 of 100, 0:00:10 left\n"
        advance(1)
        assert log.getvalue().count("\n") == 1


def test_a_stage_whose_first_thing_takes_long_is_shown(clock, log):
    with Display(log, clock) as display, stages.stage("scanning folder [a]"):
        clock.now += 20
        display.tick()
    assert log.getvalue() == "scanning folder [a]\n"


def test_the_display_is_not_silenced_with_a_library(clock, capsys):
    silenced = contextlib.redirect_stderr(io.StringIO())
    with Display(clock=clock), silenced, stages.stage("preparing") as advance:
        clock.now += 20
        advance(1)
    assert capsys.readouterr().err == "preparing: 1\n"


@pytest.mark.parametrize("label", ["exact", "learned_optimizer@0.001", "a[bold]b"])
def test_80_columns_cut_nothing_off(label):
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=20)
    with progress._Progress(console) as bars:
        view = progress._Bars(bars)
        view.run(progress.Status(
            label, 60_000, METRICS["classification"], "validating", 12_500, 12.34, 0.1234, 0.853,
            left=40_000.0,
        ))  # fmt: skip
        stage = stages.Stage("nearest neighbor on test tasks", 60_000, 12_000)
        view.stage(stage, 3.0)
        bars.tasks[-1].start_time = -100.0
        shown = Console(file=(file := io.StringIO()), width=80)
        for renderable in bars.get_renderables():
            shown.print(renderable)
    text = file.getvalue()
    for part in (label, "12,500/60,000", "12.3 steps/s", "11:06:40 left", stage.what):
        assert part in text
    assert "validating, loss 0.123, validation 85.3 %" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    assert len(text.splitlines()) == 3


def test_a_terminal_shows_only_stages_that_take_long(clock):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with progress._Progress(console) as bars:
        view = progress._Bars(bars)
        view.stage(stages.Stage("short", 10), 0.0)
        (table,) = bars.get_renderables()
        assert isinstance(table, Table)
        assert table.row_count == 0


class _Closed(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


def test_a_reader_that_is_gone_does_not_end_the_work(clock):
    with Display(_Closed(), clock) as display:
        display.run("exact", 10, metric=METRICS["classification"])(phase="compiling")


def test_a_process_without_standard_error_shows_nothing(clock, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", None)
    with Display(clock=clock) as display:
        display.run("exact", 10, metric=METRICS["classification"])(phase="compiling")
    assert capsys.readouterr().out == ""


def test_work_that_is_done_again_and_again_has_few_lines(clock, log):
    with Display(log, clock) as display:
        for _ in range(9):
            with stages.stage("scoring tasks", 100):
                clock.now += 7
                display.tick()
    assert log.getvalue().splitlines() == ["scoring tasks"] * 2


def test_colors_that_are_asked_for_bring_no_moving_bars_to_a_log(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # set by notebooks and by CI
    log = io.StringIO()
    with progress.Display(log) as display:
        show = display.run("exact", 100, metric=METRICS["classification"])
        for completed in range(3):
            show(completed=completed)
    assert "\x1b" not in log.getvalue()
