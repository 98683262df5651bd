"""The plots of a run directory, and of a test episode."""

import contextlib
import pathlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from jaxmaml.averaging import averaged
from jaxmaml.data import datasets, sinusoid
from jaxmaml.experiments import agent_figures, plots
from jaxmaml.experiments.experiment import Experiment, scored_tasks
from jaxmaml.experiments.presets import Preset
from jaxmaml.experiments.references import Reference
from jaxmaml.experiments.run import Run
from jaxmaml.experiments.run_dir import Gradient, RunDir
from jaxmaml.experiments.scoring import Score
from jaxmaml.files import WriteError, check_absent
from jaxmaml.types import MetaParams, State, Task, as_stateful

LIVE_SHARE = 0.01
"""The part of the time that may be spent on drawing during the training."""
FIRST_SECONDS = 0.5
"""The time of a drawing, as long as none was made."""


def draw_all(
    run_dir: RunDir,
    experiment: Experiment,
    runs: Sequence[Run],
    *,
    reference: Reference | None,
    gradient: Gradient | None,
) -> list[pathlib.Path]:
    """Draws all plots of a run directory. The first run is shown on a task.

    Args:
        run_dir: where the plots are written.
        experiment: what the runs share.
        runs: the runs.
        reference: what the scores are compared with; None for regression.
        gradient: first-order against exact meta-gradients; None if they were not compared.

    Returns:
        The files written.
    """
    # Draw.
    preset = experiment.preset
    scores = {run.label: run.test for run in runs}
    figures = {"metric_per_step": metric_per_step(preset, scores, reference)}
    if preset.num_validations:
        curves = {run.label: validation_curve(preset, run.curve) for run in runs}
        headlines = {run.test.headline for run in runs}
        figures["learning_curves"] = learning_curves(preset, curves, headlines)
    if gradient is not None and gradient["step"]:
        figures["gradient_agreement"] = plots.gradient_agreement(
            gradient["step"], gradient["cosine"], gradient["norm_ratio"]
        )
    if preset.domain == "reinforcement":
        figures |= agent_figures.draw(experiment, runs[0])
    elif preset.is_regression:
        figures["regression"] = _regression(preset, runs[0])
    else:
        figures["episode"] = _predicted_episode(experiment, runs[0])

    # Write.
    files = {run_dir.plot(name): figure for name, figure in figures.items()}
    for path, figure in files.items():
        plots.save(figure, path, replace=True)  # the learning curves are there already
    return list(files)


def draw_episode(experiment: Experiment, path: pathlib.Path) -> None:
    """Draws the first test task of an experiment, without a model.

    Raises:
        ValueError: `path` exists, or its suffix is not a format of matplotlib; or the tasks are those
            of an environment.
    """
    plots.check_format(path)
    check_absent(path)
    if experiment.preset.domain == "reinforcement":
        raise ValueError(f"{experiment.preset.name} is an environment, without examples to show")
    task = _first_task(experiment)
    if experiment.preset.is_regression:
        x, y = (np.asarray(task.query[name]).ravel() for name in ("inputs", "targets"))
        order = np.argsort(x)
        support = task.support["inputs"], task.support["targets"]
        figure = plots.regression(x[order], {"truth": y[order]}, *support)
    else:
        figure = plots.episode(*_images(experiment.preset, task))
    plots.save(figure, path)


class LiveCurves:
    """Draws the learning curves of a run directory at validations, for those who look meanwhile.

    It receives the rows of a `Recorder`. A drawing waits until all of them together take no more than
    `LIVE_SHARE` of the time.

    Args:
        run_dir: where the plot is written.
        preset: the settings.
        headlines: the inner step of each run whose score is drawn, by label.
        clock: the time in seconds.
    """

    def __init__(
        self,
        run_dir: RunDir,
        preset: Preset,
        headlines: Mapping[str, int],
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._run_dir, self._preset, self._headlines = run_dir, preset, headlines
        self._clock, self._begin = clock, clock()
        self._spent, self._last = 0.0, FIRST_SECONDS
        self._curves: dict[str, dict[str, list[Any]]] = {}

    def __call__(self, rows: Sequence[dict[str, Any]]) -> None:
        num_validations = self._add(rows)
        now = self._clock()
        if num_validations and self._spent + self._last <= LIVE_SHARE * (now - self._begin):
            self._draw()
            self._last = self._clock() - now
            self._spent += self._last

    def cut(
        self, label: str, rows: Sequence[dict[str, Any]], is_kept: Callable[[dict[str, Any]], bool]
    ) -> None:
        """Takes over the rows of a run that is continued."""
        self._curves.pop(label, None)
        self._add(rows)

    def _add(self, rows: Sequence[dict[str, Any]]) -> int:
        """Keeps the scores of the validations among some rows, and returns their number."""
        validations = [row for row in rows if "val_per_step" in row]
        for row in validations:
            empty = {"step": [], "value": [], "ci95": []}
            curve, at = self._curves.setdefault(row["label"], empty), self._headlines[row["label"]]
            curve["step"].append(row["step"])
            curve["value"] += self._preset.metric.scaled([row["val_per_step"][at]])
            curve["ci95"] += self._preset.metric.scaled([row["val_ci95_per_step"][at]])
        return len(validations)

    def _draw(self) -> None:
        figure = learning_curves(self._preset, self._curves, set(self._headlines.values()))
        with contextlib.suppress(WriteError):  # the recorder says that the disk is full
            plots.save(figure, self._run_dir.plot("learning_curves"), replace=True)


def metric_per_step(
    preset: Preset, scores: Mapping[str, Score], reference: Reference | None
) -> Figure:
    """Draws the test scores of runs, by label, after every inner step."""
    scaled = preset.metric.scaled
    headlines = {score.headline for score in scores.values()}
    headline = headlines.pop() if len(headlines) == 1 else None
    return plots.metric_per_step(
        {
            label: {"mean": scaled(score.mean), "ci95": scaled(score.ci95)}
            for label, score in scores.items()
        },
        ylabel=f"test {preset.metric.of}",
        reference=reference and (reference.name, preset.metric.factor * reference.value),
        headline=headline,
    )


def validation_curve(preset: Preset, validations: Sequence[tuple[int, Score]]) -> plots.Curve:
    """Returns the scores along a run as `learning_curves` draws them."""
    scaled = preset.metric.scaled
    return {
        "step": [step for step, _ in validations],
        "value": scaled(score.mean[score.headline] for _, score in validations),
        "ci95": scaled(score.ci95[score.headline] for _, score in validations),
    }


def learning_curves(
    preset: Preset, curves: Mapping[str, plots.Curve], headlines: Collection[int]
) -> Figure:
    """Draws the validation scores of runs, by label, after the inner steps that are quoted."""
    return plots.learning_curves(curves, ylabel=validation_name(preset, headlines))


def validation_name(preset: Preset, headlines: Collection[int]) -> str:
    """Returns the name of the scores of validations, with the inner step if all have the same."""
    steps = "".join(f" after {at} inner step{'s' * (at != 1)}" for at in headlines)
    return f"validation {preset.metric.of}{steps if len(headlines) == 1 else ''}"


def _first_task(experiment: Experiment) -> Task:
    tasks = next(scored_tasks(experiment, "test", 1))
    return jax.tree.map(lambda leaf: leaf[0], tasks)


def _images(preset: Preset, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Returns `[way, shot, ...]` and `[way, test_query, ...]`, in 0..1 as before their scaling."""
    mean, std = map(np.asarray, datasets.scaling(preset.dataset))

    def unscaled(batch: Any, num: int) -> np.ndarray:
        inputs = np.asarray(batch["inputs"])
        return np.clip(inputs * std + mean, 0, 1).reshape(preset.way, num, *inputs.shape[1:])

    return unscaled(task.support, preset.shot), unscaled(task.query, preset.test_query)


def _predicted_episode(experiment: Experiment, run: Run) -> Figure:
    """Draws the first test task with the predictions of an adapted run."""
    preset, task = experiment.preset, _first_task(experiment)
    learner, model = run.candidate.learner, run.candidate.model

    @jax.jit
    def predict(params: MetaParams, state: State, task: Task) -> Any:
        adapted, info = learner.adapt(
            params, task.support, state=state, num_inner_steps=run.test.headline
        )
        return as_stateful(model.apply_fn)(adapted, task.query, info.state)[0]

    final = averaged(run.meta_state)
    logits = predict(final.params, final.state, task)
    predictions = np.asarray(logits.argmax(-1)).reshape(preset.way, preset.test_query)
    return plots.episode(*_images(preset, task), predictions)


def _regression(preset: Preset, run: Run) -> Figure:
    """Draws the fit of one fixed sinusoid before and after adaptation."""
    # A sinusoid whose support covers only one side, so that the other side shows what was learned.
    x, shape = jnp.linspace(-5.0, 5.0, 200)[:, None], (jnp.array(3.0), jnp.array(1.0))
    support_x = jnp.linspace(-4.5, 2.0, preset.shot)[:, None]
    support = {"inputs": support_x, "targets": sinusoid.curve(*shape, support_x)}
    learner, model, last = run.candidate.learner, run.candidate.model, run.test.headline

    @jax.jit
    def fits(params: MetaParams, state: State) -> Any:
        apply_fn = as_stateful(model.apply_fn)
        view = lambda adapted, state: apply_fn(adapted, {"inputs": x}, state)[0]
        return learner.trace(params, support, view, state=state, num_inner_steps=last)

    # The model after some of its inner steps.
    curves = {"truth": sinusoid.curve(*shape, x)}
    final = averaged(run.meta_state)
    after = fits(final.params, final.state)
    for i in sorted({0, min(1, last), last}):
        curves[f"after {i} step{'s' * (i != 1)}" if i else "before"] = after[i]
    return plots.regression(x, curves, support_x, support["targets"])
