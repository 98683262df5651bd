"""One run: what it records, when it validates, what it selects, and when it stops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tiny import PRESET, REGRESSION
from jaxmaml import fitting
from jaxmaml.experiments import presets, training
from jaxmaml.experiments import run as runs
from jaxmaml.experiments.candidates import Spec
from jaxmaml.experiments.domains import METRICS
from jaxmaml.experiments.experiment import (
    build_candidate,
    build_experiment,
    init_state,
    scored_tasks,
)
from jaxmaml.experiments.progress import Display
from jaxmaml.experiments.scoring import Score, score


class Rows(list):
    """Keeps the rows of metrics."""

    is_written = True

    def __call__(self, rows):
        self.extend(rows)

    def cut(self, label, num_steps, validations):
        pass

    def finish(self):
        pass


def _run(preset=REGRESSION, *, inner_lr=0.01, images=None, probe=None, bad=()):
    """(experiment, candidate, run, rows); the tasks of the steps `bad` are not finite."""
    experiment = build_experiment(preset, seed=0, num_test_tasks=5, images=images)
    if bad:
        train = _failing(experiment.sources["train"], experiment.train_key, bad)
        experiment = experiment._replace(sources={**experiment.sources, "train": train})
    candidate = build_candidate(experiment, Spec("x", "exact", inner_lr))
    rows = Rows()
    with Display() as display:
        run = runs.train_and_test(
            experiment, candidate,
            num_test_tasks=5, record=rows, display=display, probe=probe,
        )  # fmt: skip
    return experiment, candidate, run, rows


def _failing(source, key, bad):
    """Returns a source whose tasks are not finite at some steps."""

    def failing(of_step):
        keys = jax.vmap(lambda step: jax.random.fold_in(key, step))(jnp.array(bad))
        is_bad = jnp.any(
            jnp.all(jax.random.key_data(keys) == jax.random.key_data(of_step), axis=-1)
        )
        return jax.tree.map(lambda leaf: jnp.where(is_bad, jnp.nan, leaf), source(of_step))

    return failing


def test_every_outer_step_and_validation_is_recorded():
    _, _, run, rows = _run()
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(6))
    assert all(set(row) == {"label", "step", "loss", "query_loss", "grad_norm"} for row in steps)
    validations = [row for row in rows if "val_per_step" in row]
    assert [row["step"] for row in validations] == [step for step, _ in run.curve] == [0, 3, 6]
    for row, (_, found) in zip(validations, run.curve, strict=True):
        np.testing.assert_array_equal(row["val_per_step"], found.mean)
    assert {row["label"] for row in rows} == {"x"}
    assert (run.num_outer_steps, run.stopped) == (6, "")


def test_the_test_is_that_of_the_final_state():
    preset = presets.override(REGRESSION, selection_steps=())
    experiment, candidate, run, _ = _run(preset)
    assert int(run.meta_state.step) == 6
    again = score(candidate, run.meta_state, scored_tasks(experiment, "test", 5), 5)
    np.testing.assert_array_equal(again.mean, run.test.mean)


def test_validation_selects_the_best_state():
    # A huge outer rate ruins the parameters in the first step: the initial ones are the best.
    preset = presets.override(REGRESSION, outer_lr=10.0, selection_steps=(1,))
    experiment, candidate, run, _ = _run(preset)
    assert int(run.meta_state.step) == 0
    start = init_state(experiment, candidate)
    jax.tree.map(np.testing.assert_array_equal, run.meta_state.params, start.params)
    assert run.num_outer_steps == 6


def test_as_many_validations_are_made_as_are_asked_for():
    """Validations come at the ends of dispatches, of which there were about a dozen."""
    preset = presets.override(REGRESSION, num_outer_steps=40, num_validations=20)
    run = _run(preset)[2]
    assert [step for step, _ in run.curve] == list(range(0, 41, 2))


def test_the_presets_need_no_shorter_dispatches():
    for preset in presets.PRESETS.values():
        own = fitting.steps_per_dispatch(preset.num_outer_steps)
        assert runs._steps_per_dispatch(preset) == own


def test_without_validations_the_last_state_is_tested():
    _, _, run, rows = _run(presets.override(REGRESSION, num_validations=0))
    assert (run.curve, int(run.meta_state.step)) == ([], 6)
    assert not [row for row in rows if "val_per_step" in row]


def test_a_probe_sees_the_states_of_the_run():
    seen = []
    _run(probe=lambda state: seen.append(int(state.step)))
    assert seen == [0, 1, 2, 3, 4, 5, 6]


def test_a_run_that_is_not_finite_stops():
    _, _, run, rows = _run(inner_lr=1e30)
    assert run.stopped.startswith("outer step 0: loss is")
    assert (run.num_outer_steps, int(run.meta_state.step)) == (0, 0)
    assert run.test.num_nonfinite == 5
    assert [row["step"] for row in rows if "loss" in row] == [0]


SKIPPING = presets.override(REGRESSION, on_nonfinite="skip")


def test_a_step_that_is_not_finite_can_be_skipped():
    _, _, run, rows = _run(SKIPPING, bad=(1, 4))
    steps = [row for row in rows if "loss" in row]
    assert [row["skipped"] for row in steps] == [False, True, False, False, True, False]
    assert [np.isnan(row["loss"]) for row in steps] == [row["skipped"] for row in steps]
    assert (run.num_outer_steps, run.num_skipped, run.stopped) == (6, 2, "")
    assert np.isfinite(run.test.mean).all()


def test_the_loss_that_is_shown_is_that_of_the_steps_that_were_made(monkeypatch):
    shown = []
    monkeypatch.setattr(Display, "run", lambda *args, **options: lambda **news: shown.append(news))
    _run(SKIPPING, bad=(1, 4))
    losses = [news["loss"] for news in shown if news.get("loss") is not None]
    assert losses
    assert np.isfinite(losses).all()


def test_a_run_that_skips_every_step_stops():
    _, _, run, rows = _run(SKIPPING, inner_lr=1e30)
    assert run.stopped.startswith("outer step 5: loss is")
    assert "the 5 steps before it were skipped" in run.stopped
    assert (run.num_outer_steps, run.num_skipped) == (5, 5)
    assert len([row for row in rows if "loss" in row]) == 6


RUINED = presets.override(
    REGRESSION, outer_lr=10.0, selection_steps=(1,), num_validations=6, patience=2
)
"""The first step ruins the parameters: the initial ones stay the best."""


def test_training_stops_after_validations_without_a_better_score():
    _, _, run, rows = _run(RUINED)
    assert [step for step, _ in run.curve] == [0, 1, 2]
    assert (run.num_outer_steps, run.stopped, run.stopped_early) == (2, "", True)
    assert int(run.meta_state.step) == 0
    assert len([row for row in rows if "loss" in row]) == 2


def test_a_training_that_reaches_its_end_has_not_stopped_early():
    _, _, run, _ = _run(presets.override(RUINED, patience=6))
    assert (run.num_outer_steps, run.stopped_early) == (6, False)


def test_the_predictions_of_the_best_states_are_averaged():
    preset = presets.override(RUINED, patience=0, num_averaged=3, outer_lr=0.1)
    experiment, candidate, run, rows = _run(preset)
    found = {row["step"]: row["val_criterion"] for row in rows if "val_criterion" in row}
    best = sorted(found, key=lambda step: found[step])[:3]
    assert [int(state.step) for state in run.averaged_states] == best
    assert best[0] == int(run.meta_state.step)

    # By hand: the error of the mean prediction after one step.
    tasks = next(scored_tasks(experiment, "test", 5))
    adapt = jax.jit(
        lambda params, support: candidate.learner.adapt(params, support, num_inner_steps=1)[0]
    )
    errors = []
    for i in range(5):
        task = jax.tree.map(lambda leaf: leaf[i], tasks)  # noqa: B023
        outputs = [
            candidate.model.apply_fn(adapt(state.params, task.support), task.query)
            for state in run.averaged_states
        ]
        errors.append(np.mean((np.mean(outputs, axis=0) - task.query["targets"]) ** 2))
    assert run.averaged is not None
    assert run.averaged.mean[1] == pytest.approx(np.mean(errors), rel=1e-5)
    assert run.averaged.mean[1] != run.test.mean[1]


def test_only_the_best_states_are_averaged_and_at_least_one():
    preset = presets.override(RUINED, patience=0, num_averaged=100)
    assert len(_run(preset)[2].averaged_states) == 7
    assert _run(presets.override(preset, num_averaged=1))[2].averaged is None
    _, _, run, _ = _run(preset, inner_lr=1e30)
    assert [int(state.step) for state in run.averaged_states] == [int(run.meta_state.step)]


def test_the_last_validation_score_is_shown(monkeypatch):
    shown = []
    monkeypatch.setattr(Display, "run", lambda *args, **options: lambda **news: shown.append(news))
    _, _, run, _ = _run()
    scores = [news["score"] for news in shown if "score" in news]
    assert scores == [None, *(found.mean[2] for _, found in run.curve)]


def test_images_are_scored_on_features_too(images):
    _, _, run, _ = _run(
        presets.override(PRESET, num_validations=1, hidden_sizes=(32,)), images=images
    )
    # The gray values of the classes are far apart: many features tell them apart.
    assert run.on_features == 1.0
    assert run.flops > 0


def test_a_network_with_statistics_is_not_scored_on_features(images):
    preset = presets.override(PRESET, norm="running")
    experiment = build_experiment(preset, seed=0, num_test_tasks=5, images=images)
    candidate = build_candidate(experiment, Spec("x", "exact", 0.1))
    start = init_state(experiment, candidate)
    assert runs._on_features(experiment, candidate, start, 5) is None


def _score(*mean):
    return Score(np.array(mean), np.zeros(len(mean)), 0, 0)


@pytest.mark.parametrize(
    ("domain", "mean", "steps", "expected"),
    [
        ("regression", (1.0, np.e, np.e**3), (1, 2), 2.0),
        ("regression", (1.0, np.e), (1, 5), 1.0),
        ("regression", (np.e, 1.0), (5,), 1.0),  # no such step: the headline's
        ("regression", (1.0, np.nan), (1,), np.inf),
        ("regression", (1.0, 1.0), (), np.inf),
        # Higher accuracies and returns are better.
        ("classification", (0.2, 0.4, 0.8), (1, 2), -0.6),
        ("reinforcement", (-40.0, -10.0), (1,), 10.0),
    ],
)
def test_the_criterion_of_the_selection(domain, mean, steps, expected):
    found = training._criterion(METRICS[domain], _score(*mean), steps)
    assert found == pytest.approx(expected)


def test_a_classifier_is_selected_by_its_highest_accuracy(images):
    preset = presets.override(
        PRESET, num_outer_steps=12, num_validations=12, num_val_tasks=50, selection_steps=(1,)
    )
    _, _, run, _ = _run(preset, inner_lr=0.1, images=images)
    accuracies = {step: score.mean[1] for step, score in run.curve}
    assert max(accuracies.values()) > min(accuracies.values())
    assert accuracies[int(run.meta_state.step)] == max(accuracies.values())


@pytest.mark.parametrize(("total", "num_times"), [(12, 6), (12, 5), (7, 3), (4, 12), (5, 5)])
def test_validations_are_spread_evenly(total, num_times):
    due = [index for index in range(total + 1) if training._is_due(index, total, num_times)]
    assert due[0] == 0
    assert due[-1] == total
    assert len(due) == min(total, num_times) + 1
    assert max(np.diff(due)) - min(np.diff(due)) <= 1
