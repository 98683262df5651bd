"""The runs of presets in benchmarks, and that the recipes of ablations.py and family.py exist."""

import argparse
import dataclasses
import importlib
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxmaml.experiments import learners, presets, settings
from jaxmaml.experiments.candidates import Spec
from jaxmaml.experiments.experiment import build_candidate

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

ablations = importlib.import_module("ablations")
family = importlib.import_module("family")
orders = importlib.import_module("orders")
runs = importlib.import_module("runs")


@pytest.mark.parametrize("name", ablations.VARIANTS)
def test_every_variant_changes_something_that_has_an_effect(name):
    learner, changes = ablations.resolved(name)
    variant, preset = ablations.VARIANTS[name], presets.get("omniglot-5w1s")
    changed = presets.override(preset, **changes)
    learners.check(changed, learner, "exact")
    learners.check_used(changed, variant.changes, [learner])
    if variant.of:
        of_learner, of_changes = ablations.resolved(variant.of)
        assert (learner, changed) != (of_learner, presets.override(preset, **of_changes))


def test_the_best_preset_is_the_best_variant_and_is_tested_as_in_the_paper():
    best, paper = presets.get("omniglot-5w1s-best"), presets.get("omniglot-5w1s")
    expected = presets.override(
        paper, **ablations.resolved("5 query images")[1], outer_schedule="cosine"
    )
    described = ("name", "paper", "table", "expected", "cost", "num_outer_steps")
    assert best == dataclasses.replace(
        expected, **{name: getattr(best, name) for name in described}
    )
    assert presets.title(dataclasses.replace(best, name=paper.name)) == paper.name


@pytest.mark.parametrize("preset", ["glyphs-5w1s", "omniglot-5w1s"])
@pytest.mark.parametrize("name", [*learners.of_domain("classification"), *learners.ALIASES])
def test_the_settings_of_a_learner_have_an_effect(name, preset):
    changed = presets.override(presets.get(preset), **family.SUITED.get(name, {}))
    learners.check_used(changed, family.SUITED.get(name, {}), [learners.resolve(name)[0]])
    assert all(setting in settings.options() for setting in family.SUITED.get(name, {}))


def _checkpoints(tmp_path, precision):
    """Returns the directory of the checkpoints of a run."""
    experiment = SimpleNamespace(preset=presets.get("sinusoid-5shot"), train_key=jax.random.key(0))
    candidate = SimpleNamespace(spec=Spec("exact", "exact", 0.01), label="exact")
    before = jax.config.jax_default_matmul_precision  # pyright: ignore
    jax.config.update("jax_default_matmul_precision", precision)
    try:
        found = runs._checkpoints(experiment, candidate, argparse.Namespace(checkpoints=tmp_path))
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    return found.directory


def test_a_training_is_continued_by_the_same_settings_only(tmp_path):
    assert _checkpoints(tmp_path, "highest") == _checkpoints(tmp_path, "highest")
    assert _checkpoints(tmp_path, "highest") != _checkpoints(tmp_path, "default")


def test_a_training_that_a_signal_ends_is_saved_and_continued(tmp_path, capsys):
    preset = presets.override(
        presets.get("sinusoid-5shot"),
        num_outer_steps=40, hidden_sizes=(4, 4), num_val_tasks=5, num_validations=4,
    )  # fmt: skip
    options = argparse.Namespace(
        data=None, data_dir=None, quick=True, checkpoints=tmp_path, num_test_tasks=5
    )
    experiment = runs.build(preset, 0, options)
    candidate = build_candidate(experiment, Spec("exact", "exact", preset.inner_lr))

    def interrupted(rows):
        if rows[-1]["step"] >= 20:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stop:
        runs.train(experiment, candidate, options, show=interrupted)
    assert stop.value.code == 143
    assert capsys.readouterr().err.endswith("interrupted\n")

    # What is trained afterwards, and that it ends as a training without a signal.
    seen = []
    continued = runs.train(experiment, candidate, options, show=seen.extend)
    assert 0 < seen[0]["step"] < 40
    options.checkpoints = None
    whole = runs.train(experiment, candidate, options)
    np.testing.assert_array_equal(continued.test.mean, whole.test.mean)


def test_more_seeds_on_the_same_tasks_have_no_smaller_interval():
    np.testing.assert_allclose(runs.ci95_over_seeds([[0.2, 0.1]] * 3), [0.2, 0.1])


def test_what_was_watched_comes_from_what_checkpoints_keep():
    probed = [{"step": step, "layers": {"": [0.5, step], "head": [-1.0, 2.0]}} for step in (0, 100)]
    assert orders._watched(probed) == {
        "step": [0, 100],
        "layers": {
            "": {"cosine": [0.5, 0.5], "norm_ratio": [0, 100]},
            "head": {"cosine": [-1.0, -1.0], "norm_ratio": [2.0, 2.0]},
        },
    }
