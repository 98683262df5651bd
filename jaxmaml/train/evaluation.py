"""Scoring the saved runs of a directory again, on the tasks they were trained for or on others."""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
from rich.table import Table

from jaxmaml.train import checkpoint, family, network, presets, report, results, scoring
from jaxmaml.train import experiment as experiments
from jaxmaml.train.compare import checkpoint_path
from jaxmaml.train.experiment import Experiment, Spec
from jaxmaml.train.presets import Preset
from jaxmaml.train.scoring import Score
from jaxmaml.types import MetaState


class Restored(NamedTuple):
    """The saved states of a directory's runs, and the tasks to score them on.

    Attributes:
        experiment: with the tasks to score on.
        trained: the settings that the runs were trained with.
        states: run -> its state.
    """

    experiment: Experiment
    trained: Preset
    states: dict[Spec, MetaState]


def restore(
    run_dir: pathlib.Path,
    config: dict[str, Any],
    data_dir: pathlib.Path | None,
    num_test_tasks: int,
    **changes: Any,
) -> Restored:
    """Read back what `train` or `compare` saved.

    Args:
        run_dir: where.
        config: its config.json.
        data_dir: None is the directory that the run used.
        num_test_tasks: how many tasks will be scored.
        changes: settings of the tasks that differ from training (`way`, `shot`, `test_query`,
            `num_test_inner_steps`, `dataset`, `split`); None where they do not.

    Raises:
        ValueError: a checkpoint is missing or does not fit, the data set is missing, or the runs
            cannot serve such tasks.
    """
    trained = results.preset_of(config)
    preset = presets.override(trained, **changes)
    if preset.is_regression != trained.is_regression:
        raise ValueError(f"a run of {trained.dataset!r} cannot be tested on {preset.dataset!r}")
    specs = [Spec(**run) for run in config["runs"]]
    used = config["data_dir"] and pathlib.Path(config["data_dir"])
    built = experiments.build(
        preset,
        seed=config["seed"],
        data_dir=data_dir or used,
        num_test_tasks=num_test_tasks,
        with_classes=any(family.needs_class_numbers(trained, spec.learner) for spec in specs),
        trained_as=trained,
    )
    _check_shape(config, built)
    for spec in specs:
        if not family.LEARNERS[spec.learner].has_any_way:
            network.check_served_way(preset.way, trained.way)
    # What was saved has the shape of the experiment that was trained, its class head included.
    as_trained = built._replace(preset=trained, num_classes=config.get("num_classes", 0))
    states = {}
    for spec in specs:
        path = checkpoint_path(run_dir, spec.label)
        states[spec] = checkpoint.restore(path, experiments.init_state(as_trained, spec))
    told = ", ".join(f"{name}={value}" for name, value in changes.items() if value is not None)
    named = dataclasses.replace(preset, name=f"{trained.name}, {told}" if told else trained.name)
    return Restored(
        built._replace(preset=named, num_classes=as_trained.num_classes), trained, states
    )


def table(restored: Restored, num_test_tasks: int) -> Table:
    """The scores of all runs after every inner step.

    A run that was trained with the statistics of the batch at hand is also scored with those of the
    support alone, where its learner can be.
    """
    experiment = restored.experiment
    scores: dict[str, Score] = {}
    for spec, state in restored.states.items():
        for suffix, variant in _variants(restored, spec):
            fresh = state._replace(state=variant.state) if suffix else state
            scores[spec.label + suffix] = scoring.score(
                variant, spec, fresh, "test", num_test_tasks
            )
    floor = scoring.floor(experiment, num_test_tasks)
    return report.scores_table(experiment.preset, scores, num_test_tasks, floor)


def _variants(restored: Restored, spec: Spec) -> list[tuple[str, Experiment]]:
    """(what is added to the label, the experiment to score in)."""
    policies = [("", restored.trained.norm)]
    has_both = restored.trained.norm == "transductive" and spec.learner not in family.WITHOUT_STATE
    if has_both:
        policies.append((", inductive", "inductive"))
    return [(suffix, _served(restored, spec, norm)) for suffix, norm in policies]


def _served(restored: Restored, spec: Spec, norm: Any) -> Experiment:
    """The experiment with the network as the run's learner needs it for the tasks at hand."""
    experiment, trained = restored.experiment, dataclasses.replace(restored.trained, norm=norm)
    is_whole = experiment.preset.way == trained.way or family.LEARNERS[spec.learner].has_any_way
    way = None if is_whole else experiment.preset.way
    shape = experiments.input_shape(experiment.sources["test"])
    built = network.build(trained, shape, jax.random.key(0), served_way=way)
    preset = dataclasses.replace(experiment.preset, norm=norm)
    return experiment._replace(preset=preset, model=built.model, state=built.state)


def _check_shape(config: dict[str, Any], experiment: Experiment) -> None:
    shape = experiments.input_shape(experiment.sources["test"])
    if list(shape) != config["input_shape"]:
        wanted, found = ("x".join(map(str, x)) for x in (config["input_shape"], shape))
        raise ValueError(
            f"the run was trained on inputs of {wanted}, and those of "
            f"{experiment.preset.dataset} are {found}"
        )
