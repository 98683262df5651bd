"""The plots of a run directory."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmaml.data import datasets, sinusoid
from jaxmaml.train import experiment as experiments
from jaxmaml.train import plots
from jaxmaml.train.averaging import scored_params
from jaxmaml.train.experiment import Experiment
from jaxmaml.train.presets import Preset
from jaxmaml.train.results import Gradient
from jaxmaml.train.training import Run
from jaxmaml.types import MetaLearner, Params, State, Task


def draw_all(
    out: pathlib.Path,
    experiment: Experiment,
    runs: Sequence[tuple[Run, MetaLearner]],
    *,
    floor: float | None,
    gradient: Gradient | None,
) -> list[pathlib.Path]:
    """Draw what a run directory holds; the first run is the one shown on a task.

    Returns:
        The files written.
    """
    preset = experiment.preset
    figures = {"metric_per_step.png": _metric_per_step(preset, [run for run, _ in runs], floor)}
    if preset.num_validations:
        figures["learning_curves.png"] = _learning_curves(preset, [run for run, _ in runs])
    if gradient is not None and gradient["step"]:
        figures["gradient_agreement.png"] = plots.gradient_agreement(
            gradient["step"], gradient["cosine"], gradient["norm_ratio"]
        )
    draw = _regression if preset.is_regression else _predicted_episode
    name = "regression.png" if preset.is_regression else "episode.png"
    figures[name] = draw(experiment, *runs[0])
    for name, figure in figures.items():
        plots.save(figure, out / name)
    return [out / name for name in figures]


def draw_episode(experiment: Experiment, path: pathlib.Path) -> None:
    """Draw the first test task of an experiment, without a model.

    Raises:
        ValueError: the suffix of `path` is no format of matplotlib.
    """
    task = _first_task(experiment)
    if experiment.preset.is_regression:
        x, y = (np.asarray(task.query[name]).ravel() for name in ("inputs", "targets"))
        order = np.argsort(x)
        support = task.support["inputs"], task.support["targets"]
        figure = plots.regression(x[order], {"truth": y[order]}, *support)
    else:
        figure = plots.episode(*_images(experiment.preset, task))
    plots.save(figure, path)


def _ylabel(preset: Preset) -> str:
    return "MSE" if preset.is_regression else "accuracy"


def _metric_per_step(preset: Preset, runs: list[Run], floor: float | None) -> Any:
    curves = {run.spec.label: {"mean": run.test.mean, "ci95": run.test.ci95} for run in runs}
    headlines = {run.test.headline for run in runs}
    headline = headlines.pop() if len(headlines) == 1 else None
    return plots.metric_per_step(
        curves, ylabel=f"test {_ylabel(preset)}", floor=floor, headline=headline
    )


def _learning_curves(preset: Preset, runs: list[Run]) -> Any:
    curves = {
        run.spec.label: {
            "step": [step for step, _ in run.curve],
            "value": [score.mean[score.headline] for _, score in run.curve],
            "ci95": [score.ci95[score.headline] for _, score in run.curve],
        }
        for run in runs
    }
    headlines = {run.test.headline for run in runs}
    steps = "".join(f" after {at} inner step{'s' * (at != 1)}" for at in headlines)
    steps = steps if len(headlines) == 1 else ""
    return plots.learning_curves(curves, ylabel=f"validation {_ylabel(preset)}{steps}")


def _first_task(experiment: Experiment) -> Task:
    tasks = next(experiments.fixed_tasks(experiment, "test", 1))
    return jax.tree.map(lambda leaf: leaf[0], tasks)


def _images(preset: Preset, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """`[way, shot, ...]` and `[way, test_query, ...]`, in 0..1 as they were before scaling."""
    mean, std = map(np.asarray, datasets.scaling(preset.dataset))

    def unscaled(batch: Any, num: int) -> np.ndarray:
        inputs = np.asarray(batch["inputs"])
        return np.clip(inputs * std + mean, 0, 1).reshape(preset.way, num, *inputs.shape[1:])

    return unscaled(task.support, preset.shot), unscaled(task.query, preset.test_query)


def _predicted_episode(experiment: Experiment, run: Run, learner: MetaLearner) -> Any:
    preset, task = experiment.preset, _first_task(experiment)
    model, state = experiment.model, run.meta_state.state

    @jax.jit
    def predict(params: Params, state: State, task: Task) -> Any:
        adapted, info = learner.adapt(
            params, task.support, state=state, num_inner_steps=run.test.headline
        )
        carried = (info.state,) if model.has_state else ()
        return model.apply_fn(adapted, task.query, *carried)

    logits = predict(scored_params(run.meta_state), state, task)
    predictions = np.asarray(logits.argmax(-1)).reshape(preset.way, preset.test_query)
    return plots.episode(*_images(preset, task), predictions)


def _regression(experiment: Experiment, run: Run, learner: MetaLearner) -> Any:
    """The fit of one fixed curve before and after adaptation."""
    x, shape = jnp.linspace(-5.0, 5.0, 200)[:, None], (jnp.array(3.0), jnp.array(1.0))
    support_x = jnp.linspace(-4.5, 2.0, experiment.preset.shot)[:, None]
    support = {"inputs": support_x, "targets": sinusoid.curve(*shape, support_x)}
    last = run.test.headline

    @jax.jit
    def fits(params: Params, state: State) -> Any:
        view = lambda adapted, *state: experiment.model.apply_fn(adapted, {"inputs": x}, *state)
        return learner.trace(params, support, view, state=state, num_inner_steps=last)

    curves = {"truth": sinusoid.curve(*shape, x)}
    after = fits(scored_params(run.meta_state), run.meta_state.state)
    for i in sorted({0, min(1, last), last}):
        curves[f"after {i} step{'s' * (i != 1)}" if i else "before"] = after[i]
    return plots.regression(x, curves, support_x, support["targets"])
