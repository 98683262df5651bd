"""Scores the saved runs of a directory again, on the tasks of their training or on others."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from rich.console import Group, RenderableType

from jaxmaml.experiments import (
    candidates,
    learners,
    networks,
    presets,
    ranges,
    references,
    tables,
    unseen,
)
from jaxmaml.experiments.candidates import Candidate, Spec
from jaxmaml.experiments.domains import domain_of
from jaxmaml.experiments.experiment import (
    Experiment,
    build_candidate,
    build_experiment,
    init_state,
    scored_tasks,
)
from jaxmaml.experiments.presets import Preset
from jaxmaml.experiments.run_dir import RunDir, preset_of, specs_of
from jaxmaml.experiments.scoring import (
    Score,
    averaged_suffix,
    score,
    score_of_mean,
    scored_part,
)
from jaxmaml.experiments.seeds import over_seeds
from jaxmaml.experiments.tasks import class_names, input_shape
from jaxmaml.types import MetaState, State

INDUCTIVE = ", inductive"
"""The suffix of a run that is scored with the statistics of the support in place of the batch."""


class Restored(NamedTuple):
    """The saved states of a directory's runs, and the tasks to score them on.

    Attributes:
        experiment: the experiment, with the tasks to score on.
        trained: the settings of the training.
        states: the state of each run.
        averaged: the states of each run whose predictions are averaged, if there are any.
    """

    experiment: Experiment
    trained: Preset
    states: dict[Spec, MetaState]
    averaged: dict[Spec, list[MetaState]]


def restore(
    run_dir: pathlib.Path,
    *,
    num_test_tasks: int,
    data_dir: pathlib.Path | None = None,
    **changes: Any,
) -> Restored:
    """Reads what `train` or `compare` saved.

    Args:
        run_dir: the run directory.
        num_test_tasks: the number of tasks that will be scored.
        data_dir: a prepared TFDS directory; defaults to the one of the run, except for glyphs, which
            are made in the user's cache directory.
        changes: settings of the tasks that differ from training (`way`, `shot`, `test_query`,
            `num_test_inner_steps`, `dataset`, `split`, `image_size`); None keeps a setting. Without
            `split`, the classes are those of `unseen.classes_of_test`.

    Raises:
        ValueError: a checkpoint or the dataset is missing, or the runs do not suit such tasks.
    """
    # Settings. A damaged checkpoint is found before a dataset is read.
    ranges.check_whole("num_test_tasks", num_test_tasks, minimum=2)
    directory = RunDir(run_dir)
    config = directory.read_config()
    trained, specs = preset_of(config), specs_of(config)
    for spec in specs:
        directory.verify_state(spec.label, config)
    preset = _with_changes(trained, specs, changes)

    # Tasks. Only those of the test are drawn: nothing is asked of the other splits.
    class_split, used = config["class_split"], _directory_of_run(config, preset)
    has_split = changes.get("split") is not None
    built = build_experiment(
        preset,
        seed=config["seed"],
        data_dir=data_dir or used,
        num_test_tasks=num_test_tasks,
        trained_as=trained,
        splits=("test",),
        class_split=None if has_split else unseen.classes_of_test(preset, trained, class_split),
    )
    _check_shape(config, built)
    if class_split is not None:
        unseen.warn_of_seen(class_names(built.sources["test"]), class_split)

    # States. They have the shape of the experiment that was trained, with its class head.
    num_classes = len((class_split or {"train": ()})["train"])
    built = built._replace(num_classes=num_classes)
    states, averaged = _states(directory, config, built._replace(preset=trained))
    return Restored(built, trained, states, averaged)


def _directory_of_run(config: dict[str, Any], preset: Preset) -> pathlib.Path | None:
    """Returns the directory of a run's dataset, if that of the test may be in it.

    Other datasets that somebody has prepared may be in the same one. Glyphs are prepared where they are
    looked for: a test of another run does not write to its directory.
    """
    is_elsewhere = preset.dataset == "glyphs" != config["preset"]["dataset"]
    return pathlib.Path(config["data_dir"]) if config["data_dir"] and not is_elsewhere else None


def _with_changes(trained: Preset, specs: Sequence[Spec], changes: dict[str, Any]) -> Preset:
    """Returns the settings of the test, which suit the runs."""
    dataset = changes.get("dataset") or trained.dataset
    is_other = trained.domain == "reinforcement" and dataset != trained.dataset
    if is_other or domain_of(dataset) != trained.domain:
        raise ValueError(f"a run of {trained.dataset!r} cannot be tested on {dataset!r}")
    preset = presets.override(trained, **changes)
    given = [name for name, value in changes.items() if value is not None]
    learners.check_used(preset, given, [spec.learner for spec in specs])
    learners.check_way(preset.way, trained.way, [spec.learner for spec in specs])
    return preset


def _states(
    directory: RunDir, config: dict[str, Any], experiment: Experiment
) -> tuple[dict[Spec, MetaState], dict[Spec, list[MetaState]]]:
    """Returns the final states of the runs of an experiment, and those of the best validations."""
    states, averaged = {}, {}
    for spec in specs_of(config):
        start = init_state(experiment, build_candidate(experiment, spec))
        states[spec] = directory.restore_state(spec.label, start, config)
        if experiment.preset.num_averaged > 1:
            like = scored_part(start)
            averaged[spec] = directory.restore_averaged(spec.label, like, config)
    return states, averaged


def scores_table(restored: Restored, num_test_tasks: int) -> Group:
    """Returns the scores of all runs after every inner step, and those over seeds if there are several.

    Args:
        restored: the runs and the tasks.
        num_test_tasks: the number of tasks to score.
    """
    experiment = restored.experiment
    reference = references.measure(experiment, num_test_tasks)
    found = scores(restored, num_test_tasks)
    named = {spec.label + suffix: score for (spec, suffix), score in found.items()}
    shown: list[RenderableType] = [
        tables.scores_table(experiment.preset, named, num_test_tasks, reference)
    ]
    if any(suffix == INDUCTIVE for _, suffix in found):
        shown.append("inductive: the same parameters, normalized by the support only")
    if over := over_seeds(found):
        shown.append(tables.seeds_table(experiment.preset, over, num_test_tasks))
    return Group(*shown)


def scores(restored: Restored, num_test_tasks: int) -> dict[tuple[Spec, str], Score]:
    """Returns the scores by run and by the suffix of its label that says how it was scored.

    A run that was trained with the statistics of the batch is also scored with those of the support
    alone, if its learner supports it, and one whose best states are averaged by the mean of their
    predictions.

    Args:
        restored: the runs and the tasks.
        num_test_tasks: the number of tasks to score.
    """
    experiment = restored.experiment
    found: dict[tuple[Spec, str], Score] = {}
    for spec, meta_state in restored.states.items():
        for suffix, candidate, state in _variants(restored, spec):
            used = meta_state._replace(state=state) if suffix else meta_state
            tasks = scored_tasks(experiment, "test", num_test_tasks)
            found[spec, suffix] = score(candidate, used, tasks, num_test_tasks, experiment.mesh)
            if not suffix and spec in restored.averaged:
                best = restored.averaged[spec]
                tasks = scored_tasks(experiment, "test", num_test_tasks)
                key = spec, averaged_suffix(len(best))
                found[key] = score_of_mean(candidate, best, tasks, num_test_tasks, experiment.mesh)
    return found


def _variants(restored: Restored, spec: Spec) -> list[tuple[str, Candidate, State]]:
    """Returns (suffix of the label, candidate, initial statistics) for each way to score a run."""
    if restored.trained.domain == "reinforcement":
        return [("", build_candidate(restored.experiment, spec), ())]
    norms = {"": restored.trained.norm}
    entry = learners.LEARNERS[spec.learner]
    if restored.trained.norm == "transductive" and entry.takes_state:
        norms[INDUCTIVE] = "inductive"
    return [(suffix, *_served(restored, spec, norm)) for suffix, norm in norms.items()]


def _served(restored: Restored, spec: Spec, norm: Any) -> tuple[Candidate, State]:
    """Returns the candidate with the network that its learner needs for the tasks at hand."""
    experiment, trained = restored.experiment, dataclasses.replace(restored.trained, norm=norm)
    preset = dataclasses.replace(experiment.preset, norm=norm)
    is_whole = preset.way == trained.way or learners.LEARNERS[spec.learner].serves_any_way
    network = networks.build(
        trained,
        input_shape(experiment.sources["test"]),
        jax.random.key(0),
        served_way=None if is_whole else preset.way,
    )
    candidate = candidates.build(
        spec, preset, network.model, experiment.num_classes, experiment.learner_key
    )
    return candidate, network.state


def _check_shape(config: dict[str, Any], experiment: Experiment) -> None:
    shape = input_shape(experiment.sources["test"])
    if list(shape) != config["input_shape"]:
        wanted, found = ("x".join(map(str, x)) for x in (config["input_shape"], shape))
        raise ValueError(
            f"the run was trained on inputs of {wanted}, and those of "
            f"{experiment.preset.dataset} are {found}"
        )
