"""Every learner that the commands know by name, on tiny networks of every normalisation."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmaml import cli
from jaxmaml.data import pools
from jaxmaml.train import experiment, family, network, presets
from jaxmaml.train.experiment import Spec

TINY = presets.override(
    presets.get("glyphs-5w1s"),
    way=3, shot=2, query=2, model="mlp", hidden_sizes=(4,), num_tasks=2, num_outer_steps=2,
    num_val_tasks=2,
)  # fmt: skip
SHAPE = (4, 4, 1)
OPTIONS = [
    *("--model", "mlp", "--hidden-sizes", "4", "--num-tasks", "2", "--test-query", "2"),
    *("--num-outer-steps", "2", "--num-test-tasks", "3", "--num-val-tasks", "2"),
    *("--num-validations", "1", "--num-test-inner-steps", "2"),
]  # fmt: skip
IMAGES = ["--way", "4", *OPTIONS]


@pytest.fixture(scope="module")
def classes():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (40, *SHAPE), np.uint8)
    pool = pools.from_arrays(images, np.arange(40) % 5, list("abcde"))
    return {"train": pool, "val": pool, "test": pool}


def _loss_shapes(preset, classes, learner, order="exact"):
    built = experiment.build(preset, seed=0, num_test_tasks=2, classes=classes, with_classes=True)
    made = experiment.learner(built, Spec("x", order, 0.1, learner))
    state = experiment.init_state(built, Spec("x", order, 0.1, learner))
    task = jax.tree.map(lambda leaf: leaf[0], experiment.step_tasks(built, 0))
    value_and_grad = jax.value_and_grad(made.loss, has_aux=True)
    return state, jax.eval_shape(
        lambda *args: value_and_grad(*args, state=state.state), state.params, task
    )


@pytest.mark.parametrize("learner", family.LEARNERS)
def test_every_learner_fits_a_classifier(learner, classes):
    state, ((loss, info), grads) = _loss_shapes(TINY, classes, learner)
    assert loss.shape == info.query_loss.shape == ()
    assert jax.tree.structure(grads) == jax.tree.structure(state.params)
    number = family.LEARNERS[learner].num_inner_steps(TINY)
    expected = 0 if learner == "fine_tuning" else number
    assert info.inner_losses.shape == (expected,)


@pytest.mark.parametrize("learner", family.LEARNERS)
def test_nearest_neighbour_is_scored_on_the_features_of_every_learner(learner, classes):
    spec = Spec("x", "exact", 0.1, learner)
    built = experiment.build(TINY, seed=0, num_test_tasks=2, classes=classes, with_classes=True)
    state = jax.eval_shape(lambda: experiment.init_state(built, spec))
    task = jax.tree.map(lambda leaf: leaf[0], experiment.step_tasks(built, 0))
    made, features_fn = experiment.learner(built, spec), built.model.features_fn
    assert features_fn is not None
    found = jax.eval_shape(
        lambda params: features_fn(
            made.adapt(params, task.support, num_inner_steps=0)[0], task.query
        ),
        state.params,
    )
    assert found.shape == (6, 4)


@pytest.mark.parametrize(
    ("learner", "norm"),
    [
        ("maml_plus_plus", "per_step"),
        *(
            (learner, norm)
            for learner in family.LEARNERS
            for norm in ("inductive", "running")
            if learner not in family.WITHOUT_STATE
        ),
    ],
)
def test_learners_carry_the_statistics_of_a_normalisation(learner, norm, classes):
    state, ((_, info), _) = _loss_shapes(presets.override(TINY, norm=norm), classes, learner)
    assert jax.tree.leaves(info.state)
    assert jax.tree.map(jnp.shape, info.state) == jax.tree.map(jnp.shape, state.state)


@pytest.mark.parametrize("norm", ["layer", "group", "none"])
def test_a_normalisation_of_single_examples_has_no_state(norm, classes):
    preset = presets.override(TINY, norm=norm, hidden_sizes=(12,))
    state, _ = _loss_shapes(preset, classes, "maml")
    assert state.state == ()


def test_a_residual_network_is_a_model_too():
    preset = presets.override(TINY, model="resnet12", num_filters=1, adapt_norm=False)
    built = network.build(preset, (16, 16, 1), jax.random.key(0))
    batch = {"inputs": jax.ShapeDtypeStruct((6, 16, 16, 1), jnp.float32)}
    assert jax.eval_shape(built.model.apply_fn, built.params, batch).shape == (6, 3)
    assert built.params["block"][3]["conv"][0]["kernel"].shape == (3, 3, 4, 8)
    made = family.make(family.Parts(preset, built.model, 0), "maml", "exact", 0.1)
    support = {**batch, "targets": jax.ShapeDtypeStruct((6,), jnp.int32)}
    assert jax.eval_shape(made.adapt, built.params, support)[1].inner_losses.shape == (1,)


@pytest.mark.parametrize("learner", ["reptile", "imaml", "protonet", "r2d2", "fine_tuning"])
def test_an_order_that_does_nothing_is_refused(learner, classes):
    with pytest.raises(ValueError, match=f"{learner!r} has no order"):
        _loss_shapes(TINY, classes, learner, order="first")


def test_class_numbers_are_those_of_the_pool(classes):
    """Pixels say which class they are of: each class of these images has one grey value."""
    images = np.repeat(np.arange(5, dtype=np.uint8), 8)[:, None, None, None] * np.ones(
        SHAPE, np.uint8
    )
    pool = pools.from_arrays(images, np.repeat(np.arange(5), 8), list("abcde"))
    sample = pools.sampler(pool, num_tasks=3, way=3, shot=2, query=1, classes=True)
    for batch in sample(jax.random.key(0)):
        grey = np.asarray(batch["inputs"][..., 0, 0, 0] * 255).round()
        np.testing.assert_array_equal(batch["classes"], grey)


def test_compare_takes_any_learners_and_evaluate_any_tasks(tmp_path, capsys):
    """One test, because workers share no run: several learners take long to compile."""
    out = tmp_path / "run"
    names = "maml,protonet,fine_tuning"
    assert (
        cli.main(["compare", "glyphs-5w1s", "--learners", names, "--out", str(out), *IMAGES]) == 0
    )
    results = json.loads((out / "results.json").read_text())
    assert list(results["runs"]) == ["maml", "protonet", "fine_tuning"]
    assert [len(run["accuracy_per_step"]) for run in results["runs"].values()] == [3, 1, 21]
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
    assert "trained on inputs of 28x28x1" in capsys.readouterr().err


def test_the_residual_of_imaml_is_printed(tmp_path, capsys):
    command = ["train", "sinusoid-5shot", "--learner", "imaml", "--out", str(tmp_path / "run")]
    assert cli.main([*command, *OPTIONS]) == 0
    assert re.search(r"imaml: conjugate gradients leave [\d.e-]+ of", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["compare", "glyphs-5w1s", "--learners", "maml,fomal"], "did you mean 'fomaml'"),
        (["compare", "glyphs-5w1s", "--learners", "maml,maml"], "learners must differ"),
        (["compare", "sinusoid-5shot", "--learners", "protonet"], "'protonet' classifies"),
        (["train", "glyphs-5w1s", "--learner", "reptile", "--order", "first"], "has no order"),
        (["train", "glyphs-5w1s", "--learner", "r2d2", "--norm", "inductive"], "norm='inductive'"),
        (["train", "glyphs-5w1s", "--norm", "per_step"], "only 'maml_plus_plus'"),
        (["train", "glyphs-5w1s", "--learner", "fine_tuning", "--stream"], "class numbers"),
    ],
)
def test_a_mistake_is_one_line(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*arguments, *OPTIONS]) == 2
    captured = capsys.readouterr().err.strip()
    assert captured.startswith("error: ")
    assert expected in captured
    assert "\n" not in captured
    assert not list(tmp_path.iterdir())


def test_glyphs_have_the_number_of_classes_that_pre_training_needs():
    built = experiment.build(TINY, seed=0, num_test_tasks=2, with_classes=True)
    assert built.num_classes > 100
    planned = experiment.step_tasks(built, 0).support["classes"]
    assert 0 <= planned.min() <= planned.max() < built.num_classes
