"""The training of one run: its steps, validations, selection and checkpoints."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias

import numpy as np

from jaxmaml import dispatch, fitting, processes
from jaxmaml.checkpoint import Manager
from jaxmaml.experiments import interruption
from jaxmaml.experiments.candidates import Candidate
from jaxmaml.experiments.domains import Metric
from jaxmaml.experiments.experiment import Experiment, own_tasks
from jaxmaml.experiments.scoring import Score, score, scored_part
from jaxmaml.fitting import NonFiniteError, Program
from jaxmaml.rl import trust_region
from jaxmaml.types import MetaState

Probe: TypeAlias = Callable[[MetaState], Any]
"""Looks at the state about a dozen times along a run."""


_NUMBERS = (
    *("done", "num_rows", "num_skipped", "num_skips", "num_rejected"),
    *("best", "stopped", "stopped_early"),
)  # fmt: skip
"""The attributes of a training that a checkpoint's record holds as they are."""


class Record(Protocol):
    """Stores rows of metrics."""

    @property
    def is_written(self) -> bool:
        """Whether all rows are on disk."""
        ...

    def __call__(self, rows: list[dict[str, Any]], /) -> None:
        """Stores rows after the ones that are stored."""
        ...

    def cut(self, label: str, num_steps: int, validations: list[int]) -> None:
        """Removes the rows of a run, except those of its first steps and of some validations."""
        ...

    def finish(self) -> None:
        """Writes what was kept, before the results are written."""
        ...


@dataclasses.dataclass
class Training:
    """The training of one run, and what accumulates along it.

    Attributes:
        experiment: what all runs share.
        candidate: what is trained.
        record: receives the rows of metrics.jsonl.
        probe: called about a dozen times with the state.
        checkpoints: where the training is saved, and what it goes on with.
        start: the state before the first step.
    """

    experiment: Experiment
    candidate: Candidate
    record: Record
    probe: Probe | None
    checkpoints: Manager | None
    start: MetaState

    def __post_init__(self) -> None:
        self.state = self.good = self.selected = self.start
        self.best = np.inf
        self.best_states: list[tuple[float, MetaState]] = []
        self.curve: list[tuple[int, Score]] = []
        self.probed: list[Any] = []
        self.seconds: list[float] = []
        self.done = self.num_rows = 0
        self.num_skipped = self.num_skips = self.num_rejected = 0
        self.stopped, self.stopped_early = "", False
        self._show: Callable[..., None] = lambda **news: None
        self._saved: dict[str, Any] | None = None
        self._reached: dict[str, Any] | None = None

    @property
    def seconds_per_outer_step(self) -> float:
        """The median over dispatches; the first one is left out if there are more."""
        return float(np.median(self.seconds[1:] or self.seconds or [np.nan]))

    def final_state(self) -> MetaState:
        """Returns the state to test: the selected one if validation could select one."""
        return self.selected if np.isfinite(self.best) and not self.stopped else self.state

    def averaged_states(self) -> list[MetaState]:
        """Returns the states whose predictions are averaged in a test; none if that is not asked for.

        They are those with the best validation scores, or the final one if validation selected none.
        """
        if self._num_best == 0:
            return []
        found = [] if self.stopped else [state for _, state in self.best_states]
        return found or [scored_part(self.final_state())]

    @property
    def _num_best(self) -> int:
        """The number of states with the best validation scores that are kept."""
        preset = self.experiment.preset
        wanted = preset.num_averaged if preset.num_averaged > 1 else 0
        return min(wanted, preset.num_validations + 1)

    def restore(self, say: Callable[[str], None]) -> None:
        """Goes back to the newest checkpoint, if there is one, and says so.

        Raises:
            ValueError: see `Manager.restore`.
        """
        if self.checkpoints is None:
            return
        found = self.checkpoints.restore(self._as_saved())
        if found is not None:
            self._resume(found.state, found.record)
            total = self.experiment.preset.num_outer_steps
            say(f"{self.candidate.label}: continues from outer step {self.done:,} of {total:,}")
        validations = [step for step, _ in self.curve]
        self.record.cut(self.candidate.label, self.num_rows, validations)

    def run(self, program: Program, show: Callable[..., None]) -> None:
        """Makes the outer steps, up to the last one or to one that is not finite.

        Args:
            program: the compiled steps.
            show: receives news of the run, see `progress.Status`.
        """
        total = self.experiment.preset.num_outer_steps
        self._show = show
        show(completed=self.done, score=self._last_score())
        try:
            if not (self.stopped or self.stopped_early) and self.done < total:
                self._run(program, show)
            self._save()
        except KeyboardInterrupt:
            self._save()
            raise
        finally:
            if self.checkpoints is not None:
                self.checkpoints.wait()

    def _run(self, program: Program, show: Callable[..., None]) -> None:
        total, most = self.experiment.preset.num_outer_steps, program.num_steps_per_dispatch
        num_dispatches = -(-total // most)
        if self.done == 0:
            self._look(0, num_dispatches)
        every = None if self.checkpoints is None else self.checkpoints.every
        states = dispatch.States(self.good, self.state, np.int32(self.num_skips))
        slices = fitting.run_slices(program, states, total - self.done, every=every)
        seconds, num_steps = 0.0, 0
        try:
            for more, (states, metrics) in _timed(slices):
                # The steps of a slice, and at the end of a dispatch what is due then.
                seconds, num_steps = seconds + more, num_steps + self._note(metrics)
                self.good, self.state, num_skips = states
                self.done, self.num_skips = self.num_rows, int(num_skips)
                if self.done % most == 0 or self.done == total:
                    self.seconds.append(seconds / num_steps)
                    seconds, num_steps = 0.0, 0
                    self._look(-(-self.done // most), num_dispatches)
                rate = 1 / (self.seconds_per_outer_step if self.seconds else seconds / num_steps)
                loss = _mean_loss(metrics)
                show(completed=self.done, rate=rate, loss=loss, skipped=self.num_skipped)
                self._reach()
                interruption.check()
                if self.stopped_early:
                    return
                if self.checkpoints is not None and self.checkpoints.is_due(self.done):
                    self._save()
        except NonFiniteError as error:
            self._note(error.metrics)
            self.state, self.done = error.meta_state, error.step
            cause = f" (first value that is not finite: {error.cause})" if error.cause else ""
            self.stopped = f"outer step {error.step}: {error.what}{cause}"
            self._reach()
            show(completed=self.done)

    def _reach(self) -> None:
        """Keeps the training as it is for `_save`, if all of its rows are on disk."""
        # An interruption may come at any moment, for example while later rows are written.
        # All processes keep the same points: a checkpoint needs all of them.
        if processes.first(self.record.is_written):
            self._reached = self._now()

    def _now(self) -> dict[str, Any]:
        """Returns the arguments of `Manager.save` for the training as it is."""
        record = {
            **{name: getattr(self, name) for name in _NUMBERS},
            "best_scores": [criterion for criterion, _ in self.best_states],
            "curve": [(step, _score_to_json(found)) for step, found in self.curve],
            "probed": list(self.probed),
            "seconds": list(self.seconds),
        }
        return {"state": self._as_saved(), "step": self.done, "record": record}

    def _as_saved(self) -> dict[str, Any]:
        """Returns the states of a checkpoint, whose structure is the same at every step."""
        best = [state for _, state in self.best_states]
        padding = [scored_part(self.start)] * (self._num_best - len(best))
        return {
            "state": self.state, "good": self.good, "selected": self.selected,
            "best": [*best, *padding],
        }  # fmt: skip

    def _resume(self, state: dict[str, Any], record: dict[str, Any]) -> None:
        """Takes over what `_now` returned."""
        self.state, self.good, self.selected = state["state"], state["good"], state["selected"]
        self.best_states = list(zip(record["best_scores"], state["best"], strict=False))
        for name in (*_NUMBERS, "probed", "seconds"):
            setattr(self, name, record[name])
        self.curve = [(step, _score_from_json(found)) for step, found in record["curve"]]
        self._saved = self._reached = self._now()

    def _save(self) -> None:
        """Saves the last point that was reached."""
        reached = self._reached
        if self.checkpoints is None or reached is None or reached is self._saved:
            return
        self.checkpoints.save(**reached)
        self._saved = reached

    def _note(self, metrics: dict[str, Any]) -> int:
        """Records the metrics of some steps, and returns their number."""
        columns = zip(*(values.tolist() for values in metrics.values()), strict=True)
        rows = [
            {
                "label": self.candidate.label,
                "step": self.num_rows + i,
                **dict(zip(metrics, row, strict=True)),
            }
            for i, row in enumerate(columns)
        ]
        self.record(rows)
        self.num_rows += len(rows)
        self.num_skipped += sum(row.get(dispatch.SKIPPED, False) for row in rows)
        self.num_rejected += sum(not row.get(trust_region.ACCEPTED, True) for row in rows)
        return len(rows)

    def _look(self, index: int, total: int) -> None:
        """Calls the probe and validates, if either is due after dispatch `index` of `total`."""
        preset = self.experiment.preset
        if self.probe is not None and _is_due(index, total, fitting.MIN_DISPATCHES):
            self.probed.append(self.probe(self.state))
        if preset.num_validations and _is_due(index, total, preset.num_validations):
            self._validate()

    def _last_score(self) -> float | None:
        """Returns the last validation score that would be quoted; None if there is none yet."""
        return float(self.curve[-1][1].mean[self.curve[-1][1].headline]) if self.curve else None

    def _validate(self) -> None:
        """Scores the state on the validation tasks, and keeps it if it is one of the best so far."""
        preset, num_tasks = self.experiment.preset, self.experiment.preset.num_val_tasks
        self._show(phase="validating")
        tasks = own_tasks(self.experiment, "val", num_tasks)
        found = score(self.candidate, self.state, tasks, num_tasks, self.experiment.mesh)
        criterion = _criterion(preset.metric, found, preset.selection_steps)
        self.curve.append((self.done, found))
        self._show(phase="", score=self._last_score())
        self.record([_validation_row(self.candidate.label, self.done, found, criterion)])
        if criterion < self.best:
            self.best, self.selected = criterion, self.state

        # The best ones, the earlier one first where two are equal, and those since the best one.
        if np.isfinite(criterion):
            best = [*self.best_states, (criterion, scored_part(self.state))]
            self.best_states = sorted(best, key=lambda pair: pair[0])[: self._num_best]
        late = sum(step > int(self.selected.step) for step, _ in self.curve)
        self.stopped_early = 0 < preset.patience <= late and self.done < preset.num_outer_steps


def _mean_loss(metrics: dict[str, Any]) -> float | None:
    """Returns the mean query loss of the steps that were not skipped; None if all of them were."""
    losses = metrics["query_loss"]
    made = losses[~metrics[dispatch.SKIPPED]] if dispatch.SKIPPED in metrics else losses
    return float(np.mean(made)) if len(made) else None


def _criterion(metric: Metric, score: Score, steps: tuple[int, ...]) -> float:
    """Returns a number that is lower for a better score over some inner steps.

    For an error it is the mean logarithm, which gives the steps equal weight, and otherwise minus the
    mean. It is infinite if there are no steps or a score is not finite.
    """
    if not steps:
        return np.inf
    made = score.mean[[i for i in steps if i < len(score.mean)] or [score.headline]]
    value = float(-np.mean(made) if metric.higher_is_better else np.mean(np.log(made)))
    return value if np.isfinite(value) else np.inf


def _validation_row(label: str, step: int, score: Score, criterion: float) -> dict[str, Any]:
    return {
        "label": label,
        "step": step,
        "val_per_step": score.mean,
        "val_ci95_per_step": score.ci95,
        "val_num_nonfinite": score.num_nonfinite,
        "val_criterion": criterion,
    }


def _score_to_json(score: Score) -> dict[str, Any]:
    return {
        **score._asdict(),
        "mean": score.mean.tolist(),
        "ci95": score.ci95.tolist(),
        "num_nonfinite": int(score.num_nonfinite),
    }


def _score_from_json(stored: dict[str, Any]) -> Score:
    arrays = {name: np.asarray(stored[name]) for name in ("mean", "ci95")}
    return Score(**{**stored, **arrays})


def _timed(items: Iterator[Any]) -> Iterator[tuple[float, Any]]:
    """Yields each item with the seconds that it took."""
    start = time.perf_counter()
    for item in items:
        yield time.perf_counter() - start, item
        start = time.perf_counter()


def _is_due(index: int, total: int, num_times: int) -> bool:
    """Returns whether dispatch `index` of `total` is one of `num_times` evenly spread ones."""
    return index == 0 or index * num_times // total > (index - 1) * num_times // total
