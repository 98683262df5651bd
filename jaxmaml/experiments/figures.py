"""The plots of a run directory, and of a test episode."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from jaxmaml.averaging import averaged
from jaxmaml.data import datasets, sinusoid
from jaxmaml.experiments import plots
from jaxmaml.experiments.experiment import Experiment, scored_tasks
from jaxmaml.experiments.presets import Preset
from jaxmaml.experiments.run import Run
from jaxmaml.experiments.run_dir import Gradient, RunDir
from jaxmaml.files import check_absent
from jaxmaml.types import MetaParams, State, Task, as_stateful


def draw_all(
    run_dir: RunDir,
    experiment: Experiment,
    runs: Sequence[Run],
    *,
    floor: float | None,
    gradient: Gradient | None,
) -> list[pathlib.Path]:
    """Draws all plots of a run directory. The first run is shown on a task.

    Args:
        run_dir: where the plots are written.
        experiment: what the runs share.
        runs: the runs.
        floor: accuracy of the nearest neighbor on pixels; None for regression.
        gradient: first-order against exact meta-gradients; None if they were not compared.

    Returns:
        The files written.
    """
    # Draw.
    preset = experiment.preset
    figures = {"metric_per_step": _metric_per_step(preset, runs, floor)}
    if preset.num_validations:
        figures["learning_curves"] = _learning_curves(preset, runs)
    if gradient is not None and gradient["step"]:
        figures["gradient_agreement"] = plots.gradient_agreement(
            gradient["step"], gradient["cosine"], gradient["norm_ratio"]
        )
    if preset.is_regression:
        figures["regression"] = _regression(preset, runs[0])
    else:
        figures["episode"] = _predicted_episode(experiment, runs[0])

    # Write.
    files = {run_dir.plot(name): figure for name, figure in figures.items()}
    for path, figure in files.items():
        plots.save(figure, path)
    return list(files)


def draw_episode(experiment: Experiment, path: pathlib.Path) -> None:
    """Draws the first test task of an experiment, without a model.

    Raises:
        ValueError: `path` exists, or its suffix is not a format of matplotlib.
    """
    plots.check_format(path)
    check_absent(path)
    task = _first_task(experiment)
    if experiment.preset.is_regression:
        x, y = (np.asarray(task.query[name]).ravel() for name in ("inputs", "targets"))
        order = np.argsort(x)
        support = task.support["inputs"], task.support["targets"]
        figure = plots.regression(x[order], {"truth": y[order]}, *support)
    else:
        figure = plots.episode(*_images(experiment.preset, task))
    plots.save(figure, path)


def _metric_per_step(preset: Preset, runs: Sequence[Run], floor: float | None) -> Figure:
    curves = {run.label: {"mean": run.test.mean, "ci95": run.test.ci95} for run in runs}
    headlines = {run.test.headline for run in runs}
    headline = headlines.pop() if len(headlines) == 1 else None
    return plots.metric_per_step(
        curves, ylabel=f"test {preset.metric}", floor=floor, headline=headline
    )


def _learning_curves(preset: Preset, runs: Sequence[Run]) -> Figure:
    curves = {
        run.label: {
            "step": [step for step, _ in run.curve],
            "value": [score.mean[score.headline] for _, score in run.curve],
            "ci95": [score.ci95[score.headline] for _, score in run.curve],
        }
        for run in runs
    }
    headlines = {run.test.headline for run in runs}
    steps = "".join(f" after {at} inner step{'s' * (at != 1)}" for at in headlines)
    steps = steps if len(headlines) == 1 else ""
    return plots.learning_curves(curves, ylabel=f"validation {preset.metric}{steps}")


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
