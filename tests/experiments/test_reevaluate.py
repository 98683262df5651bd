"""Saved runs give the scores of their training again, and serve other tasks if they can."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments.tiny import OPTIONS
from jaxmaml import cli
from jaxmaml.experiments import reevaluate
from jaxmaml.experiments.run_dir import RunDir

IMAGES = ["--model", "mlp", "--way", "4", "--num-validations", "1", *OPTIONS[:-5]]


def _shown(table):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_scores_of_the_training_are_found_again(compared):
    comparison, runs = compared
    restored = reevaluate.restore(comparison.run_dir.path, num_test_tasks=5)
    shown = _shown(reevaluate.scores_table(restored, 5))
    for run in runs:
        assert f"{run.test.mean[2]:.3f} ± {run.test.ci95[2]:.3f}" in shown


def test_other_tasks_are_named_and_scored(compared):
    comparison, _ = compared
    restored = reevaluate.restore(
        comparison.run_dir.path, num_test_tasks=5, shot=7, num_test_inner_steps=4, way=None
    )
    shown = _shown(reevaluate.scores_table(restored, 5))
    assert "sinusoid-5shot, shot=7, test_query=3, num_test_inner_steps=4: test MSE" in shown
    assert "4 (headline)" in shown or "\n  4 " in shown


def test_the_statistics_of_the_support_alone_are_scored_too(compared):
    comparison, _ = compared
    restored = reevaluate.restore(comparison.run_dir.path, num_test_tasks=5)
    spec = next(iter(restored.states))
    assert [suffix for suffix, *_ in reevaluate._variants(restored, spec)] == [""]
    trained = dataclasses.replace(restored.trained, norm="transductive")
    variants = reevaluate._variants(restored._replace(trained=trained), spec)
    assert [suffix for suffix, *_ in variants] == ["", ", inductive"]
    assert variants[0][2] == ()
    assert variants[1][2] != ()
    without_state = spec._replace(learner="cavia")
    variants = reevaluate._variants(restored._replace(trained=trained), without_state)
    assert [suffix for suffix, *_ in variants] == [""]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "glyphs"}, "a run of 'sinusoid' cannot be tested on 'glyphs'"),
        ({"way": 2}, "way must be 1 for regression"),
        ({"split": "x"}, "split has no effect on sinusoid-5shot"),
        ({"image_size": 28}, "image_size has no effect on sinusoid-5shot"),
        ({"num_test_tasks": 1}, "num_test_tasks must be an integer, 2 or more"),
    ],
)
def test_tasks_that_a_run_cannot_serve_are_refused(compared, changes, message):
    with pytest.raises(ValueError, match=message):
        reevaluate.restore(compared[0].run_dir.path, **{"num_test_tasks": 5, **changes})


def test_a_missing_checkpoint_is_named(compared, tmp_path):
    directory = RunDir(tmp_path)
    directory.create(compared[0].config)
    with pytest.raises(ValueError, match=r"no checkpoint at .*exact"):
        reevaluate.restore(tmp_path, num_test_tasks=5)


def test_compare_takes_any_learners_and_evaluate_any_tasks(small_datasets, tmp_path, capsys):
    """One test, because workers share no run, and several learners take long to compile."""
    out = tmp_path / "run"
    names = "maml,protonet,fine_tuning"
    command = ["compare", "glyphs-5w1s", "--learners", names, "--out", str(out), *IMAGES]
    assert cli.main(command) == 0
    results = json.loads((out / "results.json").read_text())
    assert list(results["runs"]) == ["maml", "protonet", "fine_tuning"]
    assert [len(run["accuracy_per_step"]) for run in results["runs"].values()] == [4, 1, 21]
    assert all(0 <= run["nearest_neighbour_on_features"] <= 1 for run in results["runs"].values())
    assert (out / "metric_per_step.png").stat().st_size > 0
    capsys.readouterr()
    command = ["evaluate", str(out), "--num-test-tasks", "3"]
    assert cli.main([*command, "--way", "3", "--shot", "2"]) == 0
    shown = capsys.readouterr().out
    assert "way=3, shot=2" in shown
    assert "maml, inductive" in " ".join(shown.split())  # the learner that can
    assert cli.main([*command, "--way", "5"]) == 2
    assert "only learners without a fixed head" in capsys.readouterr().err
    assert cli.main([*command, "--image-size", "14"]) == 2
    assert "trained on inputs of 4x4x1" in capsys.readouterr().err


def test_the_restored_state_is_that_of_the_run(compared):
    comparison, runs = compared
    restored = reevaluate.restore(comparison.run_dir.path, num_test_tasks=5)
    for run in runs:
        state = restored.states[run.candidate.spec]
        assert int(state.step) == int(run.meta_state.step)
        np.testing.assert_array_equal(
            state.params["head"]["kernel"], jnp.asarray(run.meta_state.params["head"]["kernel"])
        )
