"""One run of an experiment: training with validation, then the test."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from jaxmaml.train import experiment as experiments
from jaxmaml.train import loop, scoring
from jaxmaml.train.experiment import Experiment, Spec
from jaxmaml.train.scoring import Score
from jaxmaml.types import MetaLearner, MetaState

Record = Callable[[list[dict[str, Any]]], None]
"""Writes lines to metrics.jsonl."""
Probe = Callable[[MetaState], None]
"""Looks at the state about a dozen times along a run."""


class Run(NamedTuple):
    """What came of a run.

    Attributes:
        spec: what was run.
        meta_state: the final state, or the one that validation selected, or the last good one.
        curve: (outer step, validation score) in order.
        test: the score on the test tasks.
        on_features: accuracy of nearest neighbour on the unadapted features, or None.
        num_outer_steps: outer steps done.
        seconds_per_outer_step: median over dispatches, the first left out where there are more.
        compile_seconds: compiling the outer steps, or reading them from the cache.
        temp_bytes: XLA's temporary memory for a dispatch.
        flops: floating-point operations of one outer step.
        stopped: why training stopped early, "" if it did not.
    """

    spec: Spec
    meta_state: MetaState
    curve: list[tuple[int, Score]]
    test: Score
    on_features: float | None
    num_outer_steps: int
    seconds_per_outer_step: float
    compile_seconds: float
    temp_bytes: int | None
    flops: int
    stopped: str


@dataclasses.dataclass
class _Course:
    """What accumulates along a run."""

    state: MetaState
    selected: MetaState
    best: float = np.inf
    curve: list[tuple[int, Score]] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    done: int = 0
    stopped: str = ""


def run(
    experiment: Experiment,
    spec: Spec,
    learner: MetaLearner,
    *,
    num_test_tasks: int,
    record: Record,
    progress: Progress,
    probe: Probe | None = None,
) -> Run:
    """Train and test one learner.

    Args:
        experiment: what all runs share.
        spec: what this run is.
        learner: that of `spec`.
        num_test_tasks: tasks of the test.
        record: is given the lines of metrics.jsonl, a dispatch at a time.
        progress: the bar to report to.
        probe: called about a dozen times with the state.
    """
    preset = experiment.preset
    state = experiments.init_state(experiment, spec)
    bar = progress.add_task(f"{spec.label}: compiling", total=preset.num_outer_steps, rate="")
    program = _compile(experiment, learner, state)
    progress.update(bar, description=spec.label)
    course = _Course(state, state)
    look = _looker(experiment, spec, course, record, probe)
    _train(program, preset.num_outer_steps, spec, course, look, record, progress, bar)
    progress.update(bar, description=f"{spec.label}: testing")
    final = course.selected if np.isfinite(course.best) and not course.stopped else course.state
    test = scoring.score(experiment, spec, final, "test", num_test_tasks)
    progress.update(bar, description=spec.label)
    return Run(
        spec=spec,
        meta_state=final,
        curve=course.curve,
        test=test,
        on_features=scoring.on_features(experiment, spec, final, num_test_tasks),
        num_outer_steps=course.done,
        seconds_per_outer_step=_median_after_first(course.seconds),
        compile_seconds=program.compile_seconds,
        temp_bytes=program.temp_bytes,
        flops=scoring.flops_per_outer_step(experiment, learner),
        stopped=course.stopped,
    )


def _compile(experiment: Experiment, learner: MetaLearner, state: MetaState) -> loop.Program:
    """Sampling within the program where the images are on the device, else one step a call."""
    preset = experiment.preset
    options: dict[str, Any] = {
        "chunk_size": experiments.chunk_size(preset),
        "num_steps_per_dispatch": loop.steps_per_dispatch(preset.num_outer_steps),
        "mesh": experiment.mesh,
    }
    source = experiment.sources["train"]
    if callable(source):
        options["key"] = experiment.train_key
        return loop.compile_steps(learner, experiment.optimizer, state, source, **options)
    source = experiments.batches(experiment, "train", experiment.train_key, int(state.step))
    return loop.compile_batches(learner, experiment.optimizer, state, source, **options)


def _train(
    program: loop.Program,
    num_outer_steps: int,
    spec: Spec,
    course: _Course,
    look: Callable[[int, int], None],
    record: Record,
    progress: Progress,
    bar: TaskID,
) -> None:
    """Make the outer steps, filling `course`, until the last one or one that is not finite."""
    num_dispatches = -(-num_outer_steps // program.num_steps_per_dispatch)
    look(0, num_dispatches)
    items = _timed(loop.run(program, course.state, num_outer_steps))
    for index, (seconds, (course.state, metrics)) in enumerate(items, start=1):
        _take_note(course, spec, metrics, seconds, record)
        rate = f"{1 / _median_after_first(course.seconds):.3g} steps/s"
        progress.update(bar, completed=course.done, rate=rate)
        if not course.stopped:
            look(index, num_dispatches)


def new_progress() -> Progress:
    """A progress bar on stderr with steps per second and the time that remains."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("remaining"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _timed(items: Iterator[Any]) -> Iterator[tuple[float, Any]]:
    start = time.perf_counter()
    for item in items:
        yield time.perf_counter() - start, item
        start = time.perf_counter()


def _median_after_first(seconds: list[float]) -> float:
    return float(np.median(seconds[1:] or seconds or [np.nan]))


def _is_due(index: int, total: int, num_times: int) -> bool:
    """Whether the `index`-th of `total` dispatches is one of `num_times` evenly spread ones."""
    return index == 0 or index * num_times // total > (index - 1) * num_times // total


def _take_note(
    course: _Course, spec: Spec, metrics: dict[str, Any], seconds: float, record: Record
) -> None:
    names = ("loss", "query_loss", "grad_norm")
    rows = zip(*(metrics[name].tolist() for name in names), strict=True)
    lines = [
        {"label": spec.label, "step": course.done + i, **dict(zip(names, row, strict=True))}
        for i, row in enumerate(rows)
    ]
    record(lines)
    course.done = int(metrics.get("stopped_at", course.done + len(lines)))
    if "stopped_at" in metrics:
        course.stopped = f"outer step {course.done}: {metrics['stopped_because']}"
    elif lines:
        course.seconds.append(seconds / len(lines))


def _looker(
    experiment: Experiment,
    spec: Spec,
    course: _Course,
    record: Record,
    probe: Probe | None,
) -> Callable[[int, int], None]:
    preset = experiment.preset

    def look(index: int, total: int) -> None:
        if probe is not None and _is_due(index, total, loop.MIN_DISPATCHES):
            probe(course.state)
        if not preset.num_validations or not _is_due(index, total, preset.num_validations):
            return
        score = scoring.score(experiment, spec, course.state, "val", preset.num_val_tasks)
        course.curve.append((course.done, score))
        record([_validation_line(spec, course.done, score)])
        criterion = _criterion(score, preset.selection_steps)
        if criterion < course.best:
            course.best, course.selected = criterion, course.state

    return look


def _criterion(score: Score, steps: tuple[int, ...]) -> float:
    """Mean log error over some inner steps, which weighs them alike; infinite if not finite."""
    if not steps:
        return np.inf
    made = [i for i in steps if i < len(score.mean)] or [score.headline]
    value = float(np.mean(np.log(score.mean[made])))
    return value if np.isfinite(value) else np.inf


def _validation_line(spec: Spec, step: int, score: Score) -> dict[str, Any]:
    return {
        "label": spec.label,
        "step": step,
        "val_per_step": score.mean,
        "val_ci95_per_step": score.ci95,
        "val_num_nonfinite": score.num_nonfinite,
    }
