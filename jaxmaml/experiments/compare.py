"""Runs of one experiment: same initial parameters, same episodes, one run directory."""

import contextlib
import dataclasses
import json
import pathlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from jaxmaml import processes, stages
from jaxmaml.checkpoint import Manager
from jaxmaml.data.class_splits import ClassSplit
from jaxmaml.diagnostics import CgResidual
from jaxmaml.experiments import (
    candidates,
    figures,
    learners,
    probes,
    ranges,
    references,
    resuming,
    tables,
)
from jaxmaml.experiments.candidates import Candidate, Spec
from jaxmaml.experiments.devices import Devices
from jaxmaml.experiments.experiment import (
    MAX_SEED,
    Experiment,
    build_candidate,
    build_experiment,
    scored_tasks,
    step_tasks,
    with_seed,
)
from jaxmaml.experiments.presets import Preset
from jaxmaml.experiments.progress import Display
from jaxmaml.experiments.recorder import NoRecord, Recorder, Sink
from jaxmaml.experiments.references import Reference
from jaxmaml.experiments.results import make_results
from jaxmaml.experiments.run import Run, train_and_test
from jaxmaml.experiments.run_dir import (
    Gradient,
    RunDir,
    make_config,
    trained_for,
    write_json,
)
from jaxmaml.experiments.seeds import over_seeds
from jaxmaml.experiments.settings import DOCUMENTATION
from jaxmaml.experiments.tasks import (
    Streaming,
    class_sizes_of,
    class_split_of,
    input_shape,
    located,
)
from jaxmaml.experiments.training import Record
from jaxmaml.types import MetaState

if TYPE_CHECKING:
    from jaxmaml.experiments.event_files import EventFiles


class Comparison(NamedTuple):
    """One or several runs that are ready to start.

    Attributes:
        experiment: what the runs share.
        candidates: the learners, one per run.
        config: the contents of config.json.
        run_dir: where everything is written.
        is_resumed: whether the directory holds these runs already, or a part of them.
        is_complete: whether nothing is left to do.
        checkpoint_every: outer steps between two checkpoints, see `checkpoint.Manager`.
        tensorboard: whether event files are written.
    """

    experiment: Experiment
    candidates: list[Candidate]
    config: dict[str, Any]
    run_dir: RunDir
    is_resumed: bool = False
    is_complete: bool = False
    checkpoint_every: int | None = None
    tensorboard: bool = False


@contextlib.contextmanager
def prepare(
    preset: Preset,
    specs: Sequence[Spec],
    out: pathlib.Path,
    *,
    seed: int = 0,
    num_seeds: int = 1,
    num_test_tasks: int = 600,
    data_dir: pathlib.Path | None = None,
    streaming: Streaming | None = None,
    matmul_precision: str = "highest",
    checkpoint_every: int | None = None,
    tensorboard: bool = False,
    used: Devices | None = None,
) -> Iterator[Comparison]:
    """Builds the experiment and the candidates; keeps other processes out of the run directory.

    Args:
        preset: the settings.
        specs: the descriptions of the runs.
        out: the run directory. It may hold the same runs, which are continued, but no others.
        seed: the seed of the initial parameters and of the training episodes.
        num_seeds: each run is made with this number of seeds, `seed` and those after it.
        num_test_tasks: tasks of the test.
        data_dir: a prepared TFDS directory.
        streaming: how images are read during training; defaults to keeping them on the device.
        matmul_precision: the precision of matrix products, for config.json.
        checkpoint_every: outer steps between two checkpoints.
        tensorboard: whether event files are written, too.
        used: what computes; defaults to as many devices as can share the tasks of a step.

    Raises:
        ValueError: the settings, the dataset or the directory do not allow the runs.
    """
    # Check what can be checked before a dataset is read.
    ranges.check_whole("num_test_tasks", num_test_tasks, minimum=2)
    if checkpoint_every is not None:
        ranges.check_whole("checkpoint_every", checkpoint_every)
    specs = _of_all_seeds(preset, specs, seed, num_seeds)

    run_dir = RunDir(out)
    with run_dir.claimed() as held:
        # Build the experiment and the learners. The paths are absolute, so that the runs can be
        # evaluated from any directory, and classes that were drawn stay as they were drawn.
        with processes.agreeing():
            where, directory = located(preset, data_dir)
            experiment = build_experiment(
                preset, seed=seed, data_dir=data_dir, num_test_tasks=num_test_tasks,
                streaming=streaming, class_split=_drawn_before(held, where), used=used,
                with_classes=any(
                    learners.needs_class_numbers(preset, spec.learner) for spec in specs
                ),
            )  # fmt: skip
            built = _build(experiment, specs)

        # Continue what the directory holds, or nothing.
        config = make_config(
            _as_documented(held, where), specs,
            seed=seed, num_test_tasks=num_test_tasks, data_dir=directory,
            matmul_precision=matmul_precision,
            input_shape=input_shape(experiment.sources["train"]),
            class_split=class_split_of(experiment.sources),
            class_sizes=_sizes_in_folder(where, experiment),
        )  # fmt: skip
        resuming.check_same_processes(config)
        if held is not None:
            resuming.check_same(out, held, config)
            resuming.warn_of_changed_images(held, config)
        is_longer = held is not None and held["preset"] != config["preset"]
        yield Comparison(
            experiment, built, config, run_dir,
            is_resumed=held is not None,
            is_complete=processes.first(run_dir.results.is_file()) and not is_longer,
            checkpoint_every=checkpoint_every, tensorboard=tensorboard,
        )  # fmt: skip


def _of_all_seeds(preset: Preset, specs: Sequence[Spec], seed: int, num_seeds: int) -> list[Spec]:
    """Returns the descriptions of the runs of all seeds, which suit the preset."""
    ranges.check_whole("seed", seed, minimum=0, maximum=MAX_SEED)
    specs = candidates.for_each_seed(specs, seed, num_seeds)
    ranges.check_whole("seed + num_seeds - 1", seed + num_seeds - 1, minimum=0, maximum=MAX_SEED)
    for spec in specs:
        learners.check(preset, spec.learner, spec.order)
    if len({spec.label for spec in specs}) < len(specs):
        raise ValueError(f"the labels of runs must differ; got {[spec.label for spec in specs]}")
    return specs


def _build(experiment: Experiment, specs: Sequence[Spec]) -> list[Candidate]:
    """Returns the candidates. Those that differ in their seed share a learner, and its programs."""
    found = {spec.group: build_candidate(experiment, spec) for spec in specs}
    return [found[spec.group]._replace(spec=spec) for spec in specs]


def _of_seed(experiment: Experiment, spec: Spec) -> Experiment:
    return experiment if spec.seed is None else with_seed(experiment, spec.seed)


def _as_documented(held: dict[str, Any] | None, preset: Preset) -> Preset:
    """Returns a preset with the documentation that a directory holds: a newer text changes no run."""
    before = {} if held is None else held["preset"]
    return dataclasses.replace(
        preset, **{name: before[name] for name in DOCUMENTATION if name in before}
    )


def _drawn_before(held: dict[str, Any] | None, preset: Preset) -> ClassSplit | None:
    """Returns the class split that a directory holds, if no split file decides what it must be."""
    if held is None or preset.split or held["preset"]["dataset"] != preset.dataset:
        return None
    return held["class_split"] if preset.dataset.startswith("folder:") else None


def _sizes_in_folder(preset: Preset, experiment: Experiment) -> dict[str, int] | None:
    """Returns the number of images of each class; None if the dataset is not a folder of the user."""
    is_folder = preset.dataset.startswith("folder:")
    return class_sizes_of(experiment.sources) if is_folder else None


def execute(comparison: Comparison) -> list[Run]:
    """Makes all runs, prints the tables and writes the run directory.

    Returns:
        The runs. Some of them may have stopped early.
    """
    # Train and test.
    experiment, config, run_dir = comparison.experiment, comparison.config, comparison.run_dir
    num_test_tasks = config["num_test_tasks"]
    watch = _watch(comparison)
    with Display.of_process() as display:
        runs = _train_all(comparison, watch, display)
        gradient = None if watch is None else _gradient(watch, runs)
        reference = references.measure(experiment, num_test_tasks)
        residuals = _residuals(experiment, runs)
        if not processes.is_first():
            return runs
        with stages.stage("drawing the plots"):
            figures.draw_all(run_dir, experiment, runs, reference=reference, gradient=gradient)

    # Write. The results come last, so that a directory with results is a complete one.
    results = make_results(config, runs, reference=reference, gradient=gradient)
    write_json(run_dir.results, results, replace=False)

    # Print.
    console = tables.console()
    _print(console, experiment, runs, num_test_tasks, reference, residuals)
    if watch is not None and gradient is not None:
        console.print(tables.gradient_table(gradient, watch.exact.label))
    return runs


def stopped_runs(comparison: Comparison) -> dict[str, str]:
    """Returns where the runs of a complete directory stopped, by their labels."""
    results = processes.from_first(lambda: json.loads(comparison.run_dir.results.read_text()))
    return {label: run["stopped"] for label, run in results["runs"].items() if run.get("stopped")}


def write_event_files(comparison: Comparison) -> None:
    """Writes what the event files of complete runs lack.

    Raises:
        WriteError: a file cannot be written.
    """
    if not processes.is_first():
        return
    files = _event_files(comparison, warnings.warn)
    for candidate in comparison.candidates:
        rows = comparison.run_dir.read_metrics(candidate.label)
        files.cut(candidate.label, rows, lambda row: True)


class _Watch(NamedTuple):
    """The pair of runs whose meta-gradients are compared along the exact one."""

    experiment: Experiment
    exact: Candidate
    first: Candidate

    def probe(self, state: MetaState) -> dict[str, float]:
        """Returns the agreement of both meta-gradients at a state."""
        step = int(state.step)
        tasks = step_tasks(self.experiment, step)
        cosine, ratio = probes.gradient_agreement(
            self.exact.learner, self.first.learner, state, tasks, self.exact.chunk_size
        )
        return {"cosine": float(cosine), "norm_ratio": float(ratio), "step": step}


def _watch(comparison: Comparison) -> _Watch | None:
    """Returns the exact and first-order runs of one learner at the rate nearest to the preset's.

    It is None if no learner runs with both orders at the same rate. Of several seeds it is the first.
    """
    experiment = comparison.experiment
    pairs: dict[tuple[str, float, int | None], dict[str, Candidate]] = {}
    for candidate in comparison.candidates:
        spec = candidate.spec
        pairs.setdefault((spec.learner, spec.inner_lr, spec.seed), {})[spec.order] = candidate
    complete = [key for key, pair in pairs.items() if set(pair) == set(learners.ADJOINTS)]
    if not complete:
        return None
    pair = pairs[min(complete, key=lambda key: abs(key[1] - experiment.preset.inner_lr))]
    return _Watch(experiment, pair["exact"], pair["first"])


def _gradient(watch: _Watch, runs: list[Run]) -> Gradient:
    """Returns the agreement of both meta-gradients along the exact run."""
    (probed,) = (run.probed for run in runs if run.candidate is watch.exact)
    return {name: [row[name] for row in probed] for name in ("cosine", "norm_ratio", "step")}


def _train_all(comparison: Comparison, watch: _Watch | None, display: Display) -> list[Run]:
    """Makes each run and saves its state."""
    runs, run_dir, config = [], comparison.run_dir, comparison.config
    say = lambda line: display.say(f"warning: {line}")
    record: Record = NoRecord()
    if processes.is_first():
        record = Recorder(run_dir, config, comparison.is_resumed, say, _sinks(comparison, say))
    for candidate in comparison.candidates:
        checkpoints = Manager(
            run_dir.training(candidate.label), every=comparison.checkpoint_every,
            config=trained_for(candidate.label, config), say=say,
        )  # fmt: skip
        run = train_and_test(
            _of_seed(comparison.experiment, candidate.spec), candidate,
            num_test_tasks=config["num_test_tasks"],
            record=record, display=display, checkpoints=checkpoints,
            probe=watch.probe if watch is not None and candidate is watch.exact else None,
        )  # fmt: skip
        record.finish()
        run_dir.save_state(candidate.label, run.meta_state, config)
        if run.averaged_states:
            run_dir.save_averaged(candidate.label, run.averaged_states, config)
        runs.append(run)
    return runs


def _sinks(comparison: Comparison, say: Callable[[str], None]) -> list[Sink]:
    """Returns what receives the rows of metrics.jsonl, too."""
    headlines = {found.label: found.headline_step for found in comparison.candidates}
    live = figures.LiveCurves(comparison.run_dir, comparison.experiment.preset, headlines)
    return [live, _event_files(comparison, say)] if comparison.tensorboard else [live]


def _event_files(comparison: Comparison, say: Callable[[str], None]) -> "EventFiles":
    from jaxmaml.experiments.event_files import EventFiles

    return EventFiles(comparison.run_dir.event_files, comparison.experiment.preset.metric.name, say)


def _residuals(experiment: Experiment, runs: list[Run]) -> dict[str, CgResidual]:
    """Returns the residuals of the runs whose meta-gradient solves a linear system."""
    solving = [run for run in runs if run.candidate.entry.solves_linear_system]
    if not solving:
        return {}
    tasks = next(scored_tasks(experiment, "test", 1))
    return {
        run.label: probes.cg_residuals(run.candidate.learner, run.meta_state, tasks)
        for run in solving
    }


def _print(
    console: Console,
    experiment: Experiment,
    runs: list[Run],
    num_test_tasks: int,
    reference: Reference | None,
    residuals: dict[str, CgResidual],
) -> None:
    """Prints the scores and costs of the runs."""
    # Many scores have one row each, few have one column each.
    preset = experiment.preset
    scores = {key: score for run in runs for key, score in run.scores().items()}
    if len(scores) > tables.MAX_COLUMNS:
        console.print(tables.summary_table(preset, runs, num_test_tasks, reference))
    else:
        found = sorted(scores.items(), key=lambda item: item[0][1] != "")
        named = {spec.label + suffix: score for (spec, suffix), score in found}
        table = tables.scores_table(preset, named, num_test_tasks, reference)
        tables.add_features(table, runs)
        tables.add_costs(table, preset, runs)
        console.print(table)

    if over := over_seeds(scores):
        console.print(tables.seeds_table(preset, over, num_test_tasks))

    # Lines below the tables.
    for label, found in residuals.items():
        console.print(tables.residual_line(label, found))
    if len({run.candidate.spec.inner_lr for run in runs}) > 1:
        console.print(tables.best_line(preset, runs))
