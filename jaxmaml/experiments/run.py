"""One run: a candidate is trained, validated along the way, selected and tested."""

from typing import Any, NamedTuple

from jaxmaml import dispatch, fitting
from jaxmaml.checkpoint import Manager
from jaxmaml.experiments.candidates import Candidate, Spec
from jaxmaml.experiments.experiment import (
    Experiment,
    build_candidate,
    init_state,
    own_tasks,
    scored_tasks,
    step_tasks,
)
from jaxmaml.experiments.presets import Preset
from jaxmaml.experiments.probes import flops_per_outer_step, nearest_neighbor_on_features
from jaxmaml.experiments.progress import Display
from jaxmaml.experiments.scoring import Score, averaged_suffix, score, score_of_mean
from jaxmaml.experiments.training import Probe, Record, Training
from jaxmaml.types import MetaState


class Run(NamedTuple):
    """The outcome of a run.

    Attributes:
        candidate: what was trained.
        meta_state: the final state, or the one that validation selected, or the last good one.
        curve: (outer step, validation score), in the order of the steps.
        test: the score on the test tasks.
        averaged_states: the states with the best validation scores, without their optimizers; none if
            their predictions are not averaged.
        averaged: the score of the mean of their predictions on the same tasks; None without them.
        on_features: accuracy of the nearest neighbor on the features of the unadapted network; None
            for regression and for networks that carry statistics.
        num_outer_steps: outer steps done.
        seconds_per_outer_step: median over dispatches; the first one is left out if there are more.
        compile_seconds: the time of compiling the outer steps, or of reading them from the cache.
        temp_bytes: XLA's temporary memory for a dispatch.
        flops: floating-point operations of one outer step.
        stopped: the step that was not finite and ended training, with its cause; "" if none did.
        stopped_early: whether training ended because validation scores did not improve any more.
        num_skipped: outer steps that were left out because they were not finite.
        num_rejected: outer steps of a trust region that left the parameters as they were.
        probed: what the probe returned along the run.
    """

    candidate: Candidate
    meta_state: MetaState
    curve: list[tuple[int, Score]]
    test: Score
    averaged_states: list[MetaState]
    averaged: Score | None
    on_features: float | None
    num_outer_steps: int
    seconds_per_outer_step: float
    compile_seconds: float
    temp_bytes: int | None
    flops: int
    stopped: str
    stopped_early: bool
    num_skipped: int
    num_rejected: int
    probed: list[Any]

    @property
    def label(self) -> str:
        """The name of the run."""
        return self.candidate.label

    def scores(self) -> dict[tuple[Spec, str], Score]:
        """Returns the score of the run, and that of the mean of predictions, each with its suffix."""
        spec = self.candidate.spec
        found = {(spec, ""): self.test}
        if self.averaged is not None:
            found[spec, averaged_suffix(len(self.averaged_states))] = self.averaged
        return found


def train_and_test(
    experiment: Experiment,
    candidate: Candidate,
    *,
    num_test_tasks: int,
    record: Record,
    display: Display,
    probe: Probe | None = None,
    checkpoints: Manager | None = None,
) -> Run:
    """Trains and tests a candidate.

    Args:
        experiment: what all runs share.
        candidate: what is trained.
        num_test_tasks: tasks of the test.
        record: receives the rows of metrics.jsonl.
        display: shows the progress.
        probe: called about a dozen times with the state; what it returns JSON must be able to hold.
        checkpoints: where the training is saved, and what it goes on with.
    """
    # Compile. A training that is restored before costs nothing if it is refused. The learner may be
    # that of another seed, whose programs are compiled already; only the parameters it makes differ.
    preset = experiment.preset
    start = init_state(experiment, build_candidate(experiment, candidate.spec))
    show = display.run(candidate.label, preset.num_outer_steps, metric=preset.metric)
    show(phase="compiling")
    training = Training(experiment, candidate, record, probe, checkpoints, start)
    training.restore(display.say)
    program = _compiled(experiment, candidate, training.state)
    show(phase="")

    # Train and validate.
    training.run(program, show)

    # Test.
    show(phase="testing")
    final, best = training.final_state(), training.averaged_states()
    tasks = own_tasks(experiment, "test", num_test_tasks)
    test = score(candidate, final, tasks, num_test_tasks, experiment.mesh)
    averaged = _score_of_mean(experiment, candidate, best, num_test_tasks)
    on_features = _on_features(experiment, candidate, final, num_test_tasks)
    show(phase="counting operations")
    tasks = step_tasks(experiment, 0)
    flops = flops_per_outer_step(
        candidate.learner, experiment.optimizer, start, tasks, candidate.chunk_size
    )
    show(phase="")
    return Run(
        candidate=candidate,
        meta_state=final,
        curve=training.curve,
        test=test,
        averaged_states=best,
        averaged=averaged,
        on_features=on_features,
        num_outer_steps=training.done,
        seconds_per_outer_step=training.seconds_per_outer_step,
        compile_seconds=program.compile_seconds,
        temp_bytes=program.temp_bytes,
        flops=flops,
        stopped=training.stopped,
        stopped_early=training.stopped_early,
        num_skipped=training.num_skipped,
        num_rejected=training.num_rejected,
        probed=training.probed,
    )


def _compiled(experiment: Experiment, candidate: Candidate, state: MetaState) -> fitting.Program:
    """Returns the program of the outer steps."""
    num_outer_steps = experiment.preset.num_outer_steps
    return fitting.compile_program(
        candidate.learner, experiment.optimizer, state, experiment.sources["train"],
        key=experiment.train_key, chunk_size=candidate.chunk_size, mesh=experiment.mesh,
        num_steps_per_dispatch=_steps_per_dispatch(experiment.preset),
        max_skips=dispatch.skips_allowed(experiment.preset.on_nonfinite, num_outer_steps),
    )  # fmt: skip


def _steps_per_dispatch(preset: Preset) -> int:
    """Returns the outer steps of a dispatch: few enough for all validations, which come at its end."""
    between = preset.num_outer_steps // max(1, preset.num_validations)
    return min(fitting.steps_per_dispatch(preset.num_outer_steps), max(1, between))


def _score_of_mean(
    experiment: Experiment, candidate: Candidate, states: list[MetaState], num_tasks: int
) -> Score | None:
    """Returns the score of the mean of the predictions of the states, if there are any."""
    if not states:
        return None
    tasks = scored_tasks(experiment, "test", num_tasks)
    return score_of_mean(candidate, states, tasks, num_tasks, experiment.mesh)


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
