"""The plots of a run show its numbers, and a test episode."""

import jax
import numpy as np
import pytest

from experiments.tiny import PRESET, REGRESSION
from jaxmaml.experiments import figures, plots, presets
from jaxmaml.experiments.candidates import Spec
from jaxmaml.experiments.experiment import (
    build_candidate,
    build_experiment,
    init_state,
    scored_tasks,
)
from jaxmaml.experiments.run_dir import RunDir
from jaxmaml.types import as_stateful


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, by the name of their file."""
    found = {}
    monkeypatch.setattr(plots, "save", lambda figure, path, **_: found.update({path.name: figure}))
    return found


def _lines(figure):
    return {str(line.get_label()): np.asarray(line.get_ydata()) for line in figure.axes[0].lines}


def test_the_plots_show_the_numbers_of_the_runs(compared, drawn, tmp_path):
    comparison, runs = compared
    gradient = {"step": [0, 3], "cosine": [0.9, 0.8], "norm_ratio": [1.0, 2.0]}
    written = figures.draw_all(
        RunDir(tmp_path), comparison.experiment, runs, reference=None, gradient=gradient
    )
    assert [path.name for path in written] == list(drawn) == [
        "metric_per_step.png", "learning_curves.png", "gradient_agreement.png", "regression.png"
    ]  # fmt: skip
    curves = _lines(drawn["learning_curves.png"])
    expected = [score.mean[2] for _, score in runs[0].curve]
    np.testing.assert_allclose(curves["exact"], expected)
    assert drawn["learning_curves.png"].axes[0].get_ylabel().startswith("validation MSE after 2")
    exact = drawn["metric_per_step.png"].axes[0].containers[0]
    np.testing.assert_allclose(exact[0].get_ydata(), runs[0].test.mean)
    assert list(_lines(drawn["regression.png"])) == [
        "truth", "before", "after 1 step", "after 2 steps", "support"
    ]  # fmt: skip


def test_what_does_not_exist_is_not_drawn(compared, drawn, tmp_path):
    comparison, runs = compared
    preset = presets.override(REGRESSION, num_validations=0)
    experiment = comparison.experiment._replace(preset=preset)
    figures.draw_all(RunDir(tmp_path), experiment, runs, reference=None, gradient=None)
    assert list(drawn) == ["metric_per_step.png", "regression.png"]


def test_the_regression_plot_shows_the_adaptation(compared, drawn, tmp_path):
    comparison, runs = compared
    figures.draw_all(RunDir(tmp_path), comparison.experiment, runs, reference=None, gradient=None)
    lines = _lines(drawn["regression.png"])
    np.testing.assert_allclose(lines["truth"].max(), 3.0, atol=0.01)
    assert not np.allclose(lines["before"], lines["after 2 steps"])


@pytest.mark.parametrize("norm", ["transductive", "inductive"])
def test_an_episode_is_drawn_with_its_predictions(compared, images, drawn, norm):
    experiment = build_experiment(
        presets.override(PRESET, norm=norm), seed=0, num_test_tasks=2, images=images
    )
    candidate = build_candidate(experiment, Spec("x", "exact", 0.4))
    state = init_state(experiment, candidate)
    run = compared[1][0]._replace(candidate=candidate, meta_state=state)
    figure = figures._predicted_episode(experiment, run)
    task = jax.tree.map(lambda leaf: leaf[0], next(scored_tasks(experiment, "test", 1)))
    adapted, info = candidate.learner.adapt(
        state.params, task.support, state=state.state, num_inner_steps=run.test.headline
    )
    logits, _ = as_stateful(candidate.model.apply_fn)(adapted, task.query, info.state)
    right = int((logits.argmax(-1) == task.query["targets"]).sum())
    assert figure.get_suptitle() == f"3-way 2-shot episode: {right} of 15 query images right"


def test_images_are_drawn_as_before_their_scaling(images, drawn, monkeypatch, tmp_path):
    monkeypatch.setattr(figures.datasets, "scaling", lambda dataset: ((0.25,), (0.5,)))
    experiment = build_experiment(PRESET, seed=0, num_test_tasks=2, images=images)
    figures.draw_episode(experiment, tmp_path / "episode.png")
    task = jax.tree.map(lambda leaf: leaf[0], next(scored_tasks(experiment, "test", 1)))
    shown = np.asarray(drawn["episode.png"].axes[0].images[0].get_array())[..., 0]
    pixels = np.asarray(task.support["inputs"][0, ..., 0]) * 0.5 + 0.25
    np.testing.assert_allclose(shown, 1 - pixels, atol=1e-6)


def _validation(label, step):
    row = {"label": label, "step": step, "val_per_step": [1.0, 2.0, float(step)]}
    return {**row, "val_ci95_per_step": [0.1] * 3, "val_num_nonfinite": 0}


class _Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_learning_curves_are_drawn_during_the_training(drawn, tmp_path):
    clock = _Clock()
    live = figures.LiveCurves(RunDir(tmp_path), REGRESSION, {"exact": 2, "first": 2}, clock)
    live([_validation("exact", 0)])
    assert not drawn
    clock.now = 100.0
    live([{"label": "exact", "step": 0, "loss": 1.0}])
    assert not drawn
    live([_validation("exact", 3)])
    np.testing.assert_allclose(_lines(drawn["learning_curves.png"])["exact"], [0, 3])


def test_drawing_takes_a_hundredth_of_the_time(tmp_path, monkeypatch):
    clock, drawings = _Clock(), []
    live = figures.LiveCurves(RunDir(tmp_path), REGRESSION, {"exact": 2}, clock)

    def save(figure, path, replace):
        clock.now += 2.0
        drawings.append(path.name)

    monkeypatch.setattr(plots, "save", save)
    for step in range(1000):
        clock.now += 1.0
        live([_validation("exact", step)])
    assert 3 <= len(drawings) <= 0.01 * clock.now / 2 + 1


def test_a_continued_run_draws_the_validations_that_it_keeps(drawn, tmp_path):
    clock = _Clock()
    live = figures.LiveCurves(RunDir(tmp_path), REGRESSION, {"exact": 2}, clock)
    live.cut("exact", [_validation("exact", 0), {"label": "exact", "step": 0, "loss": 1.0}], bool)
    clock.now = 1000.0
    live([_validation("exact", 3)])
    np.testing.assert_allclose(_lines(drawn["learning_curves.png"])["exact"], [0, 3])
    drawn.clear()


def test_a_drawing_replaces_the_one_before_at_once(tmp_path):
    clock = _Clock()
    live = figures.LiveCurves(RunDir(tmp_path), REGRESSION, {"exact": 2}, clock)
    sizes = []
    for step in (0, 3):
        clock.now += 1000.0
        live([_validation("exact", step)])
        sizes.append((tmp_path / "learning_curves.png").stat().st_ino)
    assert sizes[0] != sizes[1]
    assert [path.name for path in tmp_path.iterdir()] == ["learning_curves.png"]
