"""Runs of one experiment: same initial parameters, same episodes, one run directory."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from jaxmaml.train import checkpoint, family, logging, pictures, report, results, scoring, training
from jaxmaml.train import experiment as experiments
from jaxmaml.train.experiment import Experiment, Spec
from jaxmaml.train.results import Gradient
from jaxmaml.train.training import Run
from jaxmaml.types import MetaLearner, MetaState


def specs_of(
    preset_lr: float, inner_lrs: Sequence[float], learners: Sequence[str] = ()
) -> list[Spec]:
    """The runs of a comparison: each learner at the preset's rate, or at each of `inner_lrs`.

    Args:
        preset_lr: the preset's inner rate.
        inner_lrs: rates to use instead.
        learners: names of `family.LEARNERS` and `ALIASES`; none is exact and first-order MAML, which
            are then called "exact" and "first".

    Raises:
        ValueError: the same rate or learner twice, or a learner that does not exist.

    >>> [spec.label for spec in specs_of(0.4, [0.1, 2.0])]
    ['exact@0.1', 'first@0.1', 'exact@2', 'first@2']
    >>> [spec.label for spec in specs_of(0.4, [], ["fomaml", "reptile"])]
    ['fomaml', 'reptile']
    """
    for name, given in (("inner_lrs", inner_lrs), ("learners", learners)):
        if len(set(given)) != len(given):
            raise ValueError(f"{name} must differ from each other, got {tuple(given)}")
    if not all(np.isfinite(inner_lrs)):
        raise ValueError(f"inner_lrs must be finite, got {tuple(inner_lrs)}")
    runs = {name: family.resolve(name) for name in learners}
    runs = runs or {order: ("maml", order) for order in family.ORDERS}
    if not inner_lrs:
        return [Spec(name, order, preset_lr, of) for name, (of, order) in runs.items()]
    return [
        Spec(f"{name}@{rate:g}", order, rate, of)
        for rate in inner_lrs
        for name, (of, order) in runs.items()
    ]


def open_run(out: pathlib.Path, config: dict[str, Any]) -> None:
    """Make a run directory, with its config.json.

    Raises:
        ValueError: `out` holds another run.
        OSError: it cannot be written.
    """
    logging.check_vacant(out)
    out.mkdir(parents=True, exist_ok=True)
    logging.write_json(out / "config.json", config)


def execute(
    experiment: Experiment, specs: Sequence[Spec], config: dict[str, Any], out: pathlib.Path
) -> list[Run]:
    """Run all of `specs`, print the tables and write the run directory.

    Args:
        experiment: what the runs share.
        specs: one or more runs.
        config: what config.json holds; see `results.config`.
        out: the run directory; see `open_run`.

    Returns:
        The runs, of which some may have stopped early.
    """
    learners = {spec: experiments.learner(experiment, spec) for spec in specs}
    watch = _watch(experiment, learners)
    runs = _train_all(experiment, learners, config["num_test_tasks"], out, watch)
    gradient = None if watch is None else watch.gradient
    floor = scoring.floor(experiment, config["num_test_tasks"])
    found = results.results(config, runs, floor=floor, gradient=gradient)
    pairs = [(run, learners[run.spec]) for run in runs]
    pictures.draw_all(out, experiment, pairs, floor=floor, gradient=gradient)
    # Last, so that a directory with results is a complete one.
    logging.write_json(out / "results.json", found)
    _print(report.console(), experiment, runs, config["num_test_tasks"], floor)
    if watch is not None:
        report.console().print(report.gradient_table(watch.gradient, watch.spec.label))
    return runs


def checkpoint_path(out: pathlib.Path, label: str) -> pathlib.Path:
    """Where the state of a run is saved."""
    return out / "checkpoints" / label


class _Watch(NamedTuple):
    """The run along which both meta-gradients are compared, and where the numbers go."""

    spec: Spec
    gradient: Gradient
    probe: Callable[[MetaState], None]


def _watch(experiment: Experiment, learners: dict[Spec, MetaLearner]) -> _Watch | None:
    """Watches MAML's exact run nearest to the preset's rate; None unless both orders are run."""
    pairs: dict[float, dict[str, Spec]] = {}
    for spec in (spec for spec in learners if spec.learner == "maml"):
        pairs.setdefault(spec.inner_lr, {})[spec.order] = spec
    rates = [rate for rate, specs in pairs.items() if set(specs) == set(family.ORDERS)]
    if not rates:
        return None
    pair = pairs[min(rates, key=lambda rate: abs(rate - experiment.preset.inner_lr))]
    exact, first = pair["exact"], pair["first"]
    gradient: Gradient = {"cosine": [], "norm_ratio": [], "step": []}

    def probe(state: MetaState) -> None:
        found = scoring.agreement(experiment, learners[exact], learners[first], state)
        for name, number in zip(("cosine", "norm_ratio"), found, strict=True):
            gradient[name].append(number)
        gradient["step"].append(int(state.step))

    return _Watch(exact, gradient, probe)


def _train_all(
    experiment: Experiment,
    learners: dict[Spec, MetaLearner],
    num_test_tasks: int,
    out: pathlib.Path,
    watch: _Watch | None,
) -> list[Run]:
    runs = []
    with training.new_progress() as progress:
        for spec, learner in learners.items():
            run = training.run(
                experiment,
                spec,
                learner,
                num_test_tasks=num_test_tasks,
                record=lambda lines: logging.append_jsonl(out / "metrics.jsonl", lines),
                progress=progress,
                probe=watch.probe if watch is not None and spec == watch.spec else None,
            )
            checkpoint.save(checkpoint_path(out, spec.label), run.meta_state)
            runs.append(run)
    return runs


def _print(
    console: Console,
    experiment: Experiment,
    runs: list[Run],
    num_test_tasks: int,
    floor: float | None,
) -> None:
    if len(runs) > report.MAX_COLUMNS:
        console.print(report.summary_table(experiment.preset, runs, num_test_tasks, floor))
    else:
        scores = {run.spec.label: run.test for run in runs}
        table = report.scores_table(experiment.preset, scores, num_test_tasks, floor)
        report.add_features(table, runs)
        report.add_costs(table, runs)
        console.print(table)
    for run in (run for run in runs if run.spec.learner == "imaml"):
        residuals = scoring.cg_residuals(experiment, run.spec, run.meta_state)
        console.print(report.residual_line(run.spec.label, residuals))
    if len({run.spec.inner_lr for run in runs}) > 1:
        console.print(report.best_line(experiment.preset, runs))
