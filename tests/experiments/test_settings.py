"""Settings say when they have an effect, and what they say is true of the learners that are built."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxmaml
from experiments.tiny import PRESET
from jaxmaml.experiments import learners, presets, settings
from jaxmaml.experiments.candidates import Spec
from jaxmaml.experiments.experiment import (
    build_candidate,
    build_experiment,
    init_state,
    scored_tasks,
    step_tasks,
)
from jaxmaml.experiments.learners import LEARNERS

GLYPHS = presets.get("glyphs-5w1s")
SINUSOID = presets.get("sinusoid-5shot")
OTHERS = {
    "hidden_sizes": (5,), "norm": "layer", "norm_scale": False, "adapt_norm": False,
    "head_scale": 1.0, "inner_lr": 0.3, "num_inner_steps": 2, "num_test_inner_steps": 2,
    "compute_dtype": "bfloat16",
}  # fmt: skip
"""Settings of the network and the inner loop, with other values than those of PRESET."""
CLASSIFIERS = learners.of_domain("classification")
UNUSED = [
    (name, setting)
    for name in CLASSIFIERS
    for setting in LEARNERS[name].unused
    if not settings.why_unused(PRESET, setting)
]


@pytest.mark.parametrize(
    ("preset", "changes", "setting", "reason"),
    [
        *(
            (SINUSOID, {}, name, "dataset='sinusoid'")
            for name in ("split", "image_size", "rotate_train", "rotate_test", "crop", "flip", "jitter")
        ),
        (SINUSOID, {}, "num_filters", "model='mlp'"),
        (SINUSOID, {}, "pooled", "model='mlp'"),
        (SINUSOID, {}, "norm_scale", "norm='none'"),
        (SINUSOID, {}, "adapt_norm", "norm='none'"),
        (SINUSOID, {"hidden_sizes": (), "norm": "layer"}, "norm", r"hidden_sizes=\(\)"),
        (GLYPHS, {}, "hidden_sizes", "model='conv'"),
        (GLYPHS, {"model": "resnet12"}, "pooled", "model='resnet12'"),
        (GLYPHS, {}, "per_step_weights", "norm='transductive'"),
        (GLYPHS, {"num_validations": 0}, "selection_steps", "num_validations=0"),
        (GLYPHS, {"num_validations": 0}, "num_val_tasks", "num_validations=0"),
        (SINUSOID, {"num_validations": 0}, "patience", "num_validations=0"),
        (GLYPHS, {}, "patience", r"selection_steps=\(\)"),
        (GLYPHS, {}, "num_averaged", r"selection_steps=\(\)"),
    ],
)  # fmt: skip
def test_a_setting_without_effect_on_a_preset_is_refused(preset, changes, setting, reason):
    changed = presets.override(preset, **changes)
    with pytest.raises(ValueError, match=f"{setting} has no effect on {preset.name} with {reason}"):
        learners.check_used(changed, [setting], ["maml"])


@pytest.mark.parametrize(
    ("learner", "changes", "message"),
    [
        (
            "protonet",
            {"inner_lr": 0.1},
            "inner_lr has no effect: learner 'protonet' does not use it",
        ),
        ("r2d2", {"num_inner_steps": 0}, "learner 'r2d2' does not use it"),
        ("anil", {"adapt_norm": False}, "learner 'anil' does not use it"),
        ("reptile", {"num_inner_steps": 3}, "learner 'reptile' uses num_inner_steps=5 instead"),
        (
            "maml",
            {"num_inner_steps": 5, "num_test_inner_steps": 2},
            "num_test_inner_steps=5 instead",
        ),
        ("maml", {"num_inner_steps": 5, "headline_step": 2}, "uses headline_step=5 instead"),
    ],
)
def test_a_setting_that_a_learner_replaces_or_ignores_is_refused(learner, changes, message):
    with pytest.raises(ValueError, match=message):
        learners.check_used(presets.override(GLYPHS, **changes), changes, [learner])
    if learner == "protonet":
        learners.check_used(presets.override(GLYPHS, **changes), changes, [learner, "maml"])


def test_the_settings_of_every_preset_but_its_own_network_are_in_use():
    of_examples = ("way", "shot", "compute_dtype")
    of_policies = ("num_trajectories", "horizon", "discount", "gae_lambda", "outer", "hidden_sizes")
    for preset in presets.PRESETS.values():
        is_policy = preset.domain == "reinforcement"
        own, other = (of_policies, of_examples) if is_policy else (of_examples, of_policies[:-1])
        for name in (*own, "num_tasks", "chunk_size", "inner_lr"):
            assert not settings.why_unused(preset, name)
        for name in other:
            assert settings.why_unused(preset, name) == f"dataset={preset.dataset!r}"
        assert bool(settings.why_unused(preset, "outer_lr")) == (preset.outer == "trpo")


def _outcome(preset, learner, images):
    """(loss, meta-gradient, test scores) of the first step: what settings of the inner loop change.

    The gradient of a head that is not used is zero, whatever the head is.
    """
    experiment = build_experiment(
        preset, seed=0, num_test_tasks=2, images=images, with_classes=True
    )  # fmt: skip
    candidate = build_candidate(experiment, Spec("x", "exact", preset.inner_lr, learner))
    state = init_state(experiment, candidate)
    tasks, test = step_tasks(experiment, 0), next(scored_tasks(experiment, "test", 2))

    @jax.jit
    def run(params, tasks, test):
        loss, grads, _ = jaxmaml.meta_grad(
            candidate.learner, params, tasks, step=0, state=state.state
        )
        task = jax.tree.map(lambda leaf: leaf[0], test)
        view = lambda adapted, state: candidate.model.apply_fn(adapted, task.query)
        logits = candidate.learner.trace(
            params, task.support, view, num_inner_steps=candidate.num_test_inner_steps
        )
        return loss, grads, logits

    return jax.device_get(run(state.params, tasks, test))


def _is_equal(one, other):
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.shape(a) == np.shape(b) and np.array_equal(a, b) for a, b in pairs)


_OUTCOMES = {}


def _of_preset(learner, images):
    if learner not in _OUTCOMES:
        _OUTCOMES[learner] = _outcome(PRESET, learner, images)
    return _OUTCOMES[learner]


@pytest.mark.parametrize(
    ("learner", "setting"),
    [
        pytest.param(*row, marks=() if row == ("protonet", "inner_lr") else pytest.mark.slow)
        for row in UNUSED
        if row[1] in OTHERS
    ],
)
def test_what_a_learner_declares_unused_changes_nothing(learner, setting, images):
    changed = dataclasses.replace(PRESET, **{setting: OTHERS[setting]})
    assert _is_equal(_outcome(changed, learner, images), _of_preset(learner, images))


@pytest.mark.slow
@pytest.mark.parametrize("setting", OTHERS)
@pytest.mark.parametrize("learner", CLASSIFIERS)
def test_what_is_accepted_changes_the_outcome(learner, setting, images):
    changed = presets.override(PRESET, **{setting: OTHERS[setting]})
    try:
        learners.check_used(changed, [setting], [learner])
    except ValueError:
        pytest.skip("refused")
    assert not _is_equal(_outcome(changed, learner, images), _of_preset(learner, images))
