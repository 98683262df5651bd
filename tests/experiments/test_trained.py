"""A trained run adapts and predicts: the same for one input at a time, and refused if it cannot be."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import jaxmaml
from experiments.tiny import IMAGE_SHAPE, PRESET, REGRESSION, initial_state, save_untrained
from jaxmaml.experiments import candidates, learners, networks, presets
from jaxmaml.experiments.trained import Trained
from jaxmaml.nn.norm import POLICIES

CLASSIFIER = presets.override(PRESET, hidden_sizes=(16,), head_scale=1.0, inner_lr=0.5)
LEARNER_OF = dict.fromkeys(POLICIES, "maml") | {"per_step": "maml_plus_plus"}
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (9, *IMAGE_SHAPE)).astype(np.uint8)
SUPPORT = {"inputs": PIXELS[:6], "targets": np.arange(6) % 3, "classes": ("cat", "dog", "emu")}


def trained_run(learner="maml", preset=CLASSIFIER, input_shape=IMAGE_SHAPE, **changes):
    """Returns a run in memory, with random parameters and, if it has any, random statistics."""
    preset = presets.override(preset, **changes)
    start = initial_state(preset, learner, input_shape)
    state = jax.tree.map(
        lambda leaf: leaf + abs(RNG.normal(size=leaf.shape)).astype(leaf.dtype), start.state
    )
    return Trained(
        spec=candidates.single(preset, learner), preset=preset, input_shape=input_shape,
        num_classes=3, matmul_precision="highest", params=start.params, state=state,
    )  # fmt: skip


def one_at_a_time(adapted, inputs):
    return np.concatenate([adapted.predict(inputs[i : i + 1]) for i in range(len(inputs))])


CASES = [(LEARNER_OF[norm], norm) for norm in POLICIES]
FAST = {"cavia", "proto_maml", "protonet", "fine_tuning"}
"""One learner of each kind of adapted parameters."""
CASES += [
    pytest.param(learner, "transductive", marks=() if learner in FAST else pytest.mark.slow)
    for learner in learners.of_domain("classification")
    if learner != "maml"
]


@pytest.mark.parametrize(("learner", "norm"), CASES)
def test_one_picture_at_a_time_is_classified_as_all_at_once(learner, norm):
    adapted = trained_run(learner, norm=norm).adapt(SUPPORT)
    together = adapted.predict(PIXELS[5:])
    np.testing.assert_allclose(one_at_a_time(adapted, PIXELS[5:]), together, atol=1e-5)
    np.testing.assert_allclose(together.sum(-1), 1, atol=1e-5)
    assert not adapted.depends_on_batch
    assert ("support" in adapted.policy) == (norm in ("transductive", "inductive"))


def test_the_statistics_of_the_batch_are_used_only_if_they_are_asked_for():
    trained = trained_run()
    adapted = trained.adapt(SUPPORT, statistics="batch")
    together = adapted.predict(PIXELS[5:])
    assert abs(one_at_a_time(adapted, PIXELS[5:]) - together).max() > 0.05
    assert adapted.depends_on_batch
    assert "predicted together" in adapted.policy
    with pytest.raises(ValueError, match="no effect on a run of norm='layer'"):
        trained_run(norm="layer").adapt(SUPPORT, statistics="batch")


def _logits(trained, support, inputs, norm):
    """Returns the logits of a learner that is built with another norm, and no code of `trained`."""
    preset = dataclasses.replace(trained.preset, norm=norm)
    network = networks.build(preset, trained.input_shape, jax.random.key(0))
    learner = candidates.build(trained.spec, preset, network.model, 3, jax.random.key(0)).learner
    batch = {"inputs": support["inputs"] / np.float32(255), "targets": support["targets"]}
    query = {"inputs": inputs / np.float32(255)}
    steps = trained.num_inner_steps
    params, info = jax.jit(
        lambda params: learner.adapt(params, batch, state=network.state, num_inner_steps=steps)
    )(trained.params)
    if norm == "inductive":
        return network.model.apply_fn(params, query, info.state)[0]
    return network.model.apply_fn(params, query)


@pytest.mark.parametrize(("norm", "same_as"), [("transductive", "inductive"), ("none", "none")])
def test_the_predictions_are_those_of_the_learner(norm, same_as):
    trained = trained_run(norm=norm)
    expected = jax.nn.softmax(_logits(trained, SUPPORT, PIXELS[6:], same_as))
    found = trained.adapt(SUPPORT).predict(PIXELS[6:])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_fewer_classes_use_a_part_of_the_head_and_may_have_different_numbers_of_pictures():
    support = {"inputs": PIXELS[:4], "targets": [0, 1, 1, 1]}
    adapted = trained_run(norm="none").adapt(support)
    assert adapted.classes == ("0", "1")
    assert adapted.predict(PIXELS).shape == (9, 2)
    assert adapted.predict(PIXELS[:0]).shape == (0, 2)


@pytest.mark.parametrize("learner", ["protonet", "unicorn"])
def test_more_classes_than_trained_for_are_served_by_learners_that_can(learner):
    support = {"inputs": PIXELS[:8], "targets": np.arange(8) % 4}
    assert trained_run(learner, norm="none").adapt(support).predict(PIXELS).shape == (9, 4)


def test_regression_adapts_to_points():
    trained = trained_run("maml", REGRESSION, (1,))
    x = np.linspace(-2, 2, 5)
    adapted = trained.adapt({"inputs": x, "targets": np.sin(x)[:, None]})
    together = adapted.predict(x)
    assert together.shape == (5, 1)
    np.testing.assert_allclose(one_at_a_time(adapted, x), together, atol=1e-6)
    more = trained.adapt({"inputs": x, "targets": np.sin(x)}, num_inner_steps=50).predict(x)
    error = lambda predicted: np.mean((predicted[:, 0] - np.sin(x)) ** 2)
    assert error(more) < error(trained.adapt(
        {"inputs": x, "targets": np.sin(x)}, num_inner_steps=0
    ).predict(x))  # fmt: skip


FLOATS = PIXELS[:6] / 255
BAD = {
    "no targets": ({"targets": None}, "must have 'targets'"),
    "one class": ({"targets": np.zeros(6, int), "classes": None}, "one class only"),
    "a class without example": ({"targets": np.arange(6) % 2}, "class 'emu' has no example"),
    "too many classes": ({"targets": np.arange(6) % 4, "classes": None}, "use 3 classes at most"),
    "names that repeat": ({"classes": ("cat", "cat", "dog")}, "distinct names"),
    "a huge target": (
        {"targets": np.array([0, 1, 2**40] * 2), "classes": None},
        "class '2' has no example",
    ),
    "negative": ({"targets": np.arange(6) - 1}, "0 or more; got -1"),
    "not integers": ({"targets": np.arange(6.0)}, "targets must be integers"),
    "floats": ({"inputs": FLOATS}, "inputs must be uint8 pixels"),
    "another size": (
        {"inputs": PIXELS[:6, :3]},
        r"must be \[num_images, 4, 4, 1\], as in training",
    ),
    "another number": ({"inputs": PIXELS[:5]}, "one target per input"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_a_support_that_cannot_be_adapted_to_is_refused(changes, message):
    support = {name: value for name, value in {**SUPPORT, **changes}.items() if value is not None}
    with pytest.raises((ValueError, TypeError), match=message):
        trained_run(norm="none").adapt(support)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([0.0, np.nan], "inputs must be finite"),
        (np.array([0.0, 1e39]), "inputs must be finite"),
        (np.zeros((2, 2)), r"must be \[n\] or \[n, 1\]"),
        (["a", "b"], "inputs must be numbers"),
    ],
)
def test_points_that_are_not_numbers_are_refused(x, message):
    with pytest.raises((ValueError, TypeError), match=message):
        trained_run("maml", REGRESSION, (1,)).adapt({"inputs": x, "targets": [0.0, 1.0]})


def test_an_adaptation_that_diverges_is_refused():
    trained = trained_run("maml", REGRESSION, (1,), inner_lr=1e30)
    with pytest.raises(ValueError, match="parameters that are not finite"):
        trained.adapt({"inputs": [0.0, 1.0], "targets": [0.0, 1.0]})


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (10**10, "num_inner_steps must be at most 100,000; got 10000000000"),
        (-1, "num_inner_steps must be an integer, 0 or more; got -1"),
        (2.5, r"num_inner_steps must be an integer, 0 or more; got 2\.5"),
    ],
)
def test_inner_steps_that_nobody_makes_are_refused(steps, message):
    with pytest.raises((ValueError, TypeError), match=message):
        trained_run(norm="none").adapt(SUPPORT, num_inner_steps=steps)


def test_inner_steps_of_a_learner_without_them_are_refused():
    with pytest.raises(ValueError, match="has no inner steps"):
        trained_run("protonet", norm="none").adapt(SUPPORT, num_inner_steps=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_untrained(tmp_path_factory.mktemp("saved") / "run", CLASSIFIER, "anil").path


def test_a_run_is_loaded_without_its_data(saved):
    trained = jaxmaml.load(saved)
    assert (trained.label, trained.input_shape) == ("anil", IMAGE_SHAPE)
    expected = initial_state(CLASSIFIER, "anil", IMAGE_SHAPE).params
    jax.tree.map(np.testing.assert_array_equal, trained.params, expected)
    assert trained.adapt(SUPPORT).predict(PIXELS[6:]).shape == (3, 3)


def test_one_of_several_runs_is_named(compared):
    run_dir = compared[0].run_dir.path
    with pytest.raises(ValueError, match="holds several runs: choose one of 'exact', 'first'"):
        jaxmaml.load(run_dir)
    with pytest.raises(ValueError, match="unknown run 'frist': did you mean 'first'"):
        jaxmaml.load(run_dir, "frist")
    assert jaxmaml.load(run_dir, "first").spec.order == "first"


def test_a_run_that_is_not_finished_or_damaged_is_refused(saved, tmp_path):
    copy = shutil.copytree(saved, tmp_path / "run")
    checkpoint = copy / "checkpoints" / "anil"
    shutil.move(checkpoint, tmp_path / "away")
    with pytest.raises(ValueError, match="its training was interrupted"):
        jaxmaml.load(copy)
    other = save_untrained(tmp_path / "other", CLASSIFIER, "boil")
    shutil.copytree(other.checkpoint("boil"), checkpoint)
    with pytest.raises(ValueError, match="was trained with another configuration"):
        jaxmaml.load(copy)
    shutil.rmtree(checkpoint)
    shutil.move(tmp_path / "away", checkpoint)
    (checkpoint / "_METADATA").write_bytes(b"")
    with pytest.raises(ValueError, match="_METADATA is damaged"):
        jaxmaml.load(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "seed": 4}))
    with pytest.raises(ValueError, match="is not as it was written"):
        jaxmaml.load(copy)
