"""One run: a candidate is trained, validated along the way, selected and tested."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

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

from jaxmaml import fitting
from jaxmaml.experiments.candidates import Candidate
from jaxmaml.experiments.experiment import Experiment, init_state, scored_tasks, step_tasks
from jaxmaml.experiments.probes import flops_per_outer_step, nearest_neighbor_on_features
from jaxmaml.experiments.scoring import Score, score
from jaxmaml.fitting import NonFiniteError, Program
from jaxmaml.types import MetaState

Record: TypeAlias = Callable[[list[dict[str, Any]]], None]
"""Stores rows of metrics."""
Probe: TypeAlias = Callable[[MetaState], None]
"""Looks at the state about a dozen times along a run."""


class Run(NamedTuple):
    """The outcome of a run.

    Attributes:
        candidate: what was trained.
        meta_state: the final state, or the one that validation selected, or the last good one.
        curve: (outer step, validation score), in the order of the steps.
        test: the score on the test tasks.
        on_features: accuracy of the nearest neighbor on the features of the unadapted network; None
            for regression and for networks that carry statistics.
        num_outer_steps: outer steps done.
        seconds_per_outer_step: median over dispatches; the first one is left out if there are more.
        compile_seconds: the time of compiling the outer steps, or of reading them from the cache.
        temp_bytes: XLA's temporary memory for a dispatch.
        flops: floating-point operations of one outer step.
        stopped: why training stopped early; "" if it did not.
    """

    candidate: Candidate
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

    @property
    def label(self) -> str:
        """The name of the run."""
        return self.candidate.label


def train_and_test(
    experiment: Experiment,
    candidate: Candidate,
    *,
    num_test_tasks: int,
    record: Record,
    progress: Progress,
    probe: Probe | None = None,
) -> Run:
    """Trains and tests a candidate.

    Args:
        experiment: what all runs share.
        candidate: what is trained.
        num_test_tasks: tasks of the test.
        record: receives the rows of metrics.jsonl, one dispatch at a time.
        progress: the progress bar.
        probe: called about a dozen times with the state.
    """
    # Compile.
    preset, learner = experiment.preset, candidate.learner
    state = init_state(experiment, candidate)
    bar = progress.add_task(f"{candidate.label}: compiling", total=preset.num_outer_steps, rate="")
    program = fitting.compile_program(
        learner, experiment.optimizer, state, experiment.sources["train"],
        key=experiment.train_key, chunk_size=candidate.chunk_size, mesh=experiment.mesh,
        num_steps_per_dispatch=fitting.steps_per_dispatch(preset.num_outer_steps),
    )  # fmt: skip
    progress.update(bar, description=candidate.label)

    # Train and validate.
    training = _Training(experiment, candidate, record, probe, progress, bar, state, state)
    training.run(program)

    # Test.
    progress.update(bar, description=f"{candidate.label}: testing")
    final = training.final_state()
    test = score(candidate, final, scored_tasks(experiment, "test", num_test_tasks), num_test_tasks)
    on_features = _on_features(experiment, candidate, final, num_test_tasks)
    progress.update(bar, description=candidate.label)
    return Run(
        candidate=candidate,
        meta_state=final,
        curve=training.curve,
        test=test,
        on_features=on_features,
        num_outer_steps=training.done,
        seconds_per_outer_step=_median_after_first(training.seconds),
        compile_seconds=program.compile_seconds,
        temp_bytes=program.temp_bytes,
        flops=flops_per_outer_step(
            learner, experiment.optimizer, state, step_tasks(experiment, 0), candidate.chunk_size
        ),
        stopped=training.stopped,
    )


def new_progress() -> Progress:
    """Returns a progress bar on stderr, with the steps per second and the remaining time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("remaining"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


@dataclasses.dataclass
class _Training:
    """The training of one run, and what accumulates along it."""

    experiment: Experiment
    candidate: Candidate
    record: Record
    probe: Probe | None
    progress: Progress
    bar: TaskID
    state: MetaState
    selected: MetaState
    best: float = np.inf
    curve: list[tuple[int, Score]] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    done: int = 0
    stopped: str = ""

    def run(self, program: Program) -> None:
        """Makes the outer steps, up to the last one or to one that is not finite."""
        num_outer_steps = self.experiment.preset.num_outer_steps
        num_dispatches = -(-num_outer_steps // program.num_steps_per_dispatch)
        self._look(0, num_dispatches)
        items = _timed(fitting.run_program(program, self.state, num_outer_steps))
        try:
            for index, (seconds, (self.state, metrics)) in enumerate(items, start=1):
                num_steps = self._note(metrics)
                self.seconds.append(seconds / num_steps)
                rate = f"{1 / _median_after_first(self.seconds):.3g} steps/s"
                self.progress.update(self.bar, completed=self.done, rate=rate)
                self._look(index, num_dispatches)
        except NonFiniteError as error:
            self._note(error.metrics)
            self.state, self.done = error.meta_state, error.step
            cause = f" (first value that is not finite: {error.cause})" if error.cause else ""
            self.stopped = f"outer step {error.step}: {error.what}{cause}"
            self.progress.update(self.bar, completed=self.done)

    def final_state(self) -> MetaState:
        """Returns the state to test: the selected one if validation could select one."""
        return self.selected if np.isfinite(self.best) and not self.stopped else self.state

    def _note(self, metrics: dict[str, Any]) -> int:
        """Records the metrics of a dispatch, and returns the number of its steps."""
        names = ("loss", "query_loss", "grad_norm")
        columns = zip(*(metrics[name].tolist() for name in names), strict=True)
        rows = [
            {
                "label": self.candidate.label,
                "step": self.done + i,
                **dict(zip(names, row, strict=True)),
            }
            for i, row in enumerate(columns)
        ]
        self.record(rows)
        self.done += len(rows)
        return len(rows)

    def _look(self, index: int, total: int) -> None:
        """Calls the probe and validates, if either is due after dispatch `index` of `total`."""
        preset = self.experiment.preset
        if self.probe is not None and _is_due(index, total, fitting.MIN_DISPATCHES):
            self.probe(self.state)
        if preset.num_validations and _is_due(index, total, preset.num_validations):
            self._validate()

    def _validate(self) -> None:
        """Scores the state on the validation tasks, and selects it if it is the best one so far."""
        preset, num_tasks = self.experiment.preset, self.experiment.preset.num_val_tasks
        tasks = scored_tasks(self.experiment, "val", num_tasks)
        found = score(self.candidate, self.state, tasks, num_tasks)
        self.curve.append((self.done, found))
        self.record([_validation_row(self.candidate.label, self.done, found)])
        criterion = _criterion(found, preset.selection_steps)
        if criterion < self.best:
            self.best, self.selected = criterion, self.state


def _on_features(
    experiment: Experiment, candidate: Candidate, meta_state: MetaState, num_tasks: int
) -> float | None:
    """Returns the accuracy of the nearest neighbor on features, where there are features."""
    features_fn = candidate.model.features_fn
    if experiment.preset.is_regression or features_fn is None:
        return None
    tasks = scored_tasks(experiment, "test", num_tasks)
    return nearest_neighbor_on_features(
        candidate.learner, features_fn, meta_state, tasks, num_tasks
    )


def _criterion(score: Score, steps: tuple[int, ...]) -> float:
    """Returns the mean log error over some inner steps, which gives them equal weight.

    It is infinite if there are no steps or a score is not finite.
    """
    if not steps:
        return np.inf
    made = [i for i in steps if i < len(score.mean)] or [score.headline]
    value = float(np.mean(np.log(score.mean[made])))
    return value if np.isfinite(value) else np.inf


def _validation_row(label: str, step: int, score: Score) -> dict[str, Any]:
    return {
        "label": label,
        "step": step,
        "val_per_step": score.mean,
        "val_ci95_per_step": score.ci95,
        "val_num_nonfinite": score.num_nonfinite,
    }


def _timed(items: Iterator[Any]) -> Iterator[tuple[float, Any]]:
    """Yields each item with the seconds that it took."""
    start = time.perf_counter()
    for item in items:
        yield time.perf_counter() - start, item
        start = time.perf_counter()


def _median_after_first(seconds: list[float]) -> float:
    return float(np.median(seconds[1:] or seconds or [np.nan]))


def _is_due(index: int, total: int, num_times: int) -> bool:
    """Returns whether dispatch `index` of `total` is one of `num_times` evenly spread ones."""
    return index == 0 or index * num_times // total > (index - 1) * num_times // total
