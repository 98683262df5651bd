"""Policies in run directories: trained, compared, tested, drawn, and refused where they must."""

import json
import re
import sys

import jax
import numpy as np
import pytest

from experiments.tiny import AGENT, REGRESSION
from jaxmaml import cli, rl
from jaxmaml.experiments import (
    agent_figures,
    agents,
    candidates,
    compare,
    experiment,
    learners,
    presets,
    ranges,
    trained,
)
from jaxmaml.experiments.candidates import Spec
from jaxmaml.experiments.domains import ENVIRONMENTS
from jaxmaml.experiments.experiment import build_experiment, init_state, scored_tasks
from jaxmaml.experiments.learners import LEARNERS

OPTIONS = [
    *("--hidden-sizes", "4", "--num-tasks", "2", "--num-outer-steps", "6"),
    *("--num-trajectories", "3", "--horizon", "5", "--num-test-tasks", "5"),
    *("--num-val-tasks", "5", "--num-validations", "2", "--num-test-inner-steps", "2"),
    *("--num-inner-steps", "1"),
]
"""Options for the settings of AGENT."""


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """(comparison, runs) of exact MAML, first-order MAML and no adaptation in training."""
    out = tmp_path_factory.mktemp("agents") / "run"
    specs = candidates.comparison(AGENT)
    with compare.prepare(AGENT, specs, out, num_test_tasks=5) as comparison:
        return comparison, compare.execute(comparison)


def test_every_environment_can_be_made_by_its_name():
    assert set(agents.ENVIRONMENTS) == set(ENVIRONMENTS)


def test_a_comparison_of_policies_writes_a_whole_run_directory(compared):
    comparison, runs = compared
    path = comparison.run_dir.path
    assert sorted(file.name for file in path.iterdir()) == [
        "checkpoints", "config.json", "gradient_agreement.png", "learning_curves.png",
        "metric_per_step.png", "metrics.jsonl", "results.json", "training", "trajectories.png",
    ]  # fmt: skip
    assert [run.label for run in runs] == ["exact", "first", "pretrained"]
    results = json.loads((path / "results.json").read_text())
    for run in runs:
        assert results["runs"][run.label]["return_per_step"] == run.test.mean.tolist()
        assert len(run.test.mean) == 3
    goals = [batch.query.task for batch in scored_tasks(comparison.experiment, "test", 5)]
    optimum = agents.environment(AGENT).optimal_return
    assert optimum is not None
    best = np.mean([optimum(goal, AGENT.horizon) for goal in np.concatenate(goals)[:5]])
    assert results["floor"]["optimal_return"] == pytest.approx(best, rel=1e-5)
    assert all(run.test.mean.max() < best for run in runs)


def test_the_pretrained_policy_makes_no_inner_step_in_training(compared):
    comparison, (exact, _, pretrained) = compared
    found = comparison.run_dir.read_metrics("pretrained")
    assert len([row for row in found if "loss" in row]) == AGENT.num_outer_steps
    assert LEARNERS["pretrained"].num_inner_steps(AGENT) == 0
    # At the start the policies are the same, and so are their scores.
    np.testing.assert_allclose(
        exact.curve[0][1].mean, pretrained.curve[0][1].mean, rtol=1e-5, atol=1e-5
    )


def test_the_inner_rate_after_the_first_step_is_the_later_one():
    preset = presets.override(AGENT, inner_lr=0.5, later_inner_lr=0.0, num_test_inner_steps=2)
    moved = []
    for later in (0.0, 0.25):
        chosen = presets.override(preset, later_inner_lr=later)
        experiment = build_experiment(chosen, seed=0, num_test_tasks=2)
        model = experiment.network.model
        spec = Spec("exact", "exact", chosen.inner_lr)
        learner = candidates.build(spec, chosen, model, 0, jax.random.key(0)).learner
        task = jax.tree.map(lambda leaf: leaf[0], next(scored_tasks(experiment, "test", 2)))
        view = lambda params, state: params["log_std"]
        seen = learner.trace(experiment.network.params, task.support, view, num_inner_steps=2)
        moved.append(np.diff(seen, axis=0))
    np.testing.assert_allclose(moved[0][0], moved[1][0], rtol=1e-6)
    np.testing.assert_allclose(moved[0][1], 2 * moved[1][1], rtol=1e-4)


def test_trpo_is_chosen_and_its_rejected_steps_are_counted(tmp_path, monkeypatch):
    preset = presets.override(AGENT, outer="trpo", num_outer_steps=3)
    original = rl.Trpo._search

    def fails(self, loss, losses):
        number, accepted, kl = original(self, loss, losses)
        return number, accepted & False, kl

    monkeypatch.setattr(rl.Trpo, "_search", fails)
    specs = [Spec("exact", "exact", preset.inner_lr)]
    with compare.prepare(preset, specs, tmp_path / "run", num_test_tasks=3) as comparison:
        (run,) = compare.execute(comparison)
    assert run.num_rejected == 3
    start = init_state(comparison.experiment, comparison.candidates[0])
    jax.tree.map(np.testing.assert_array_equal, run.meta_state.params, start.params)
    rows = comparison.run_dir.read_metrics("exact")
    assert [row["accepted"] for row in rows if "accepted" in row] == [False] * 3
    assert json.loads(comparison.run_dir.results.read_text())["runs"]["exact"]["num_rejected"] == 3


def test_a_policy_is_trained_tested_again_and_reported_by_the_commands(tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["train", "nav2d", *OPTIONS, "--out", str(out)]) == 0
    trained_table = capsys.readouterr().out
    assert "nav2d, num_test_inner_steps=2: test return, 95 % CI over 5 tasks" in trained_table
    assert "best possible" in trained_table
    assert cli.main(["evaluate", str(out), "--num-test-tasks", "5"]) == 0
    row = re.compile(r"^ *2 .*$", re.MULTILINE)
    tested = capsys.readouterr().out
    assert row.findall(tested)[-1].split()[1:4] == row.findall(trained_table)[-1].split()[1:4]
    assert cli.main(["report", str(out)]) == 0
    page = (out / "report" / "report.html").read_text()
    assert "Best expected return of a policy that knows the task" in page
    assert "Trajectories in test tasks" in page


@pytest.mark.parametrize(
    "name", [n for n in presets.PRESETS if presets.get(n).domain == "reinforcement"]
)
def test_every_preset_of_a_policy_names_settings_that_have_an_effect(name):
    preset = presets.get(name)
    learners.check(preset, "maml", "exact")
    ranges.check(preset)
    assert preset.norm == "none"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 0}, "horizon must be an integer, 1 or more; got 0"),
        ({"num_trajectories": 0}, "num_trajectories must be an integer, 1 or more; got 0"),
        ({"discount": 1.5}, r"discount must be between 0 and 1; got 1\.5"),
        ({"gae_lambda": -0.1}, r"gae_lambda must be between 0 and 1; got -0\.1"),
        ({"outer": "trpo", "max_kl": 0.0}, "max_kl must be positive"),
        ({"num_trajectories": 10**6, "horizon": 10**6}, "reduce one of num_tasks=2, num_traj"),
    ],
)
def test_settings_outside_their_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        presets.override(AGENT, **changes)


def test_trpo_is_refused_outside_environments():
    with pytest.raises(ValueError, match="outer must be adam outside environments; got 'trpo'"):
        presets.override(REGRESSION, outer="trpo")


@pytest.mark.parametrize("learner", ["protonet", "imaml", "fine_tuning", "anil"])
def test_a_learner_of_examples_is_refused(learner):
    with pytest.raises(ValueError, match="maml, meta_sgd, pretrained can be used"):
        learners.check(AGENT, learner, "exact")


def test_no_adaptation_is_for_policies():
    with pytest.raises(ValueError, match="'pretrained' is for reinforcement, but sinusoid is regr"):
        learners.check(REGRESSION, "pretrained", "exact")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nav2d", "--way", "3"], "way has no effect on nav2d with dataset='nav2d'"),
        (["train", "nav2d", "--model", "conv"], "model has no effect"),
        (["train", "nav2d", "--max-kl", "0.1"], "max_kl has no effect on nav2d with outer='adam'"),
        (["train", "sinusoid-5shot", "--horizon", "5"], "horizon has no effect"),
        (["train", "nav2d", "--stream"], "nav2d has no images to stream"),
        (["train", "nav2d", "--data-dir", "x"], "data_dir has no effect on dataset='nav2d'"),
        (["train", "nav2d", "--learner", "anil"], "learner 'anil' is for classification and regr"),
        (["train", "cheetah-dir"], "brax.envs is not installed: pip install 'jaxmaml[brax]'"),
    ],
)
def test_what_a_policy_cannot_use_is_refused(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "brax.envs", None)
    assert cli.main([*arguments, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_environment_has_no_examples_to_show(tmp_path, capsys):
    assert cli.main(["data", "show", "nav2d", "--out", str(tmp_path / "task.png")]) == 2
    assert "nav2d is an environment, without examples to show" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("outer", ["trpo", "promp"])
def test_every_outer_optimizer_trains(outer, tmp_path):
    preset = presets.override(AGENT, outer=outer, num_outer_steps=2)
    specs = candidates.comparison(preset, names=["maml", "meta_sgd", "pretrained"])
    with compare.prepare(preset, specs, tmp_path / "run", num_test_tasks=3) as comparison:
        runs = compare.execute(comparison)
    for run in runs:
        rows = comparison.run_dir.read_metrics(run.label)
        assert all(np.isfinite(row["kl"]) for row in rows if "loss" in row)
        assert run.num_outer_steps == 2


@pytest.mark.parametrize("name", ["bandits", pytest.param("tabular-mdp", marks=pytest.mark.slow)])
def test_discrete_actions_are_drawn_as_probabilities(name, tmp_path):
    preset = presets.override(
        presets.get(name), num_tasks=2, num_outer_steps=2, num_trajectories=3, horizon=4,
        num_validations=0,
    )  # fmt: skip
    specs = [Spec("exact", "exact", preset.inner_lr)]
    with compare.prepare(preset, specs, tmp_path / "run", num_test_tasks=3) as comparison:
        (run,) = compare.execute(comparison)
    assert comparison.run_dir.plot("actions").is_file()
    figure = agent_figures.draw(comparison.experiment, run)["actions"]
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:3] == ["mean reward", "before", "after 1 step"]


def test_a_policy_takes_no_files(compared, tmp_path, capsys):
    comparison, _ = compared
    path = comparison.run_dir.path
    with pytest.raises(ValueError, match="a run of nav2d is a policy"):
        trained.load(path, "exact")
    options = ["--support", str(tmp_path), "--images", str(tmp_path), "--run", "exact"]
    assert cli.main(["adapt", str(path), *options]) == 2
    assert "a run of nav2d is a policy, which adapts in its environment" in capsys.readouterr().err


def test_a_policy_cannot_be_tested_in_another_environment(compared, capsys):
    comparison, _ = compared
    command = ["evaluate", str(comparison.run_dir.path), "--dataset", "bandits"]
    assert cli.main(command) == 2
    assert "a run of 'nav2d' cannot be tested on 'bandits'" in capsys.readouterr().err


@pytest.mark.parametrize("outer", ["adam", "promp"])
def test_the_schedule_and_the_average_are_those_of_outer_steps(outer):
    preset = presets.override(AGENT, outer=outer, outer_schedule="cosine", num_outer_steps=10)
    epochs = {"adam": 1, "promp": 5}[outer]
    lengths, decays = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            experiment.optax, "cosine_decay_schedule",
            lambda rate, length, alpha: lengths.append(length) or rate,
        )  # fmt: skip
        patch.setattr(
            experiment.averaging, "with_average",
            lambda optimizer, decay: decays.append(decay) or optimizer,
        )  # fmt: skip
        built = build_experiment(preset, seed=0, num_test_tasks=2)
        experiment.outer_optimizer(preset, built.network.model)
    assert set(lengths) == {10 * epochs}
    np.testing.assert_allclose([decay**epochs for decay in decays], preset.averaging)
