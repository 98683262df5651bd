"""Every learner that the commands know by name trains, and does what its row says it can do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmaml
from experiments.tiny import PRESET, REGRESSION
from jaxmaml import diagnostics
from jaxmaml.experiments import candidates, learners, networks, presets, probes
from jaxmaml.experiments.candidates import Spec
from jaxmaml.experiments.experiment import (
    build_candidate,
    build_experiment,
    init_state,
    outer_optimizer,
    step_tasks,
)
from jaxmaml.experiments.learners import LEARNERS

CLASSIFIERS = learners.of_domain("classification")
CARRY_STATE = [name for name in CLASSIFIERS if LEARNERS[name].takes_state]


_EXPERIMENTS = {}
"""Experiments by preset: building one takes longer than most tests of it."""


def _built(preset, images, learner, order="exact", inner_lr=0.1):
    """(experiment, candidate, initial state) of a learner."""
    if preset not in _EXPERIMENTS:
        _EXPERIMENTS[preset] = build_experiment(
            preset, seed=0, num_test_tasks=2, images=images, with_classes=not preset.is_regression
        )
    experiment = _EXPERIMENTS[preset]
    candidate = build_candidate(experiment, Spec("x", order, inner_lr, learner))
    return experiment, candidate, init_state(experiment, candidate)


def test_the_linear_system_of_imaml_is_solved_for_a_network_with_batch_statistics():
    """Undamped, its matrix has negative eigenvalues, and 2.9 of the right-hand side was left."""
    shape, keys = (12, 12, 1), jax.random.split(jax.random.key(0), 4)
    preset = presets.override(
        presets.get("glyphs-5w1s"), num_filters=8, inner_lr=0.1, head_scale=1.0
    )
    network = networks.build(preset, shape, keys[0])
    spec = candidates.single(preset, "imaml")
    learner = candidates.build(spec, preset, network.model, 5, keys[1]).learner
    state = jaxmaml.init_state(learner, outer_optimizer(preset, network.model), network.params)

    targets = jnp.tile(jnp.arange(5), (4, 1))
    tasks = jaxmaml.Task(
        *(
            {"inputs": jax.random.uniform(key, (4, 5, *shape)), "targets": targets}
            for key in keys[2:]
        )
    )
    residuals = probes.cg_residuals(learner, state, tasks)
    assert residuals.solver < 1e-3
    assert residuals.undamped < 1


@pytest.mark.parametrize("learner", CLASSIFIERS)
def test_every_learner_fits_a_classifier(learner, images):
    preset = presets.override(PRESET, num_outer_steps=20, outer_lr=0.02)
    experiment, candidate, state = _built(preset, images, learner)
    tasks = step_tasks(experiment, 0)
    step = jax.jit(
        lambda state: jaxmaml.meta_step(candidate.learner, experiment.optimizer, state, tasks)
    )
    losses = []
    for _ in range(20):
        state, metrics = step(state)
        losses.append(float(metrics["query_loss"]))
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize(
    "learner", [name for name, row in LEARNERS.items() if row.least_inner_steps]
)
def test_a_learner_makes_its_least_number_of_inner_steps(learner, images):
    least = LEARNERS[learner].least_inner_steps
    for num_inner_steps, expected in ((1, least), (least + 1, least + 1)):
        preset = presets.override(PRESET, num_inner_steps=num_inner_steps)
        experiment, candidate, state = _built(preset, images, learner)
        support = jax.tree.map(lambda leaf: leaf[0], step_tasks(experiment, 0).support)
        _, info = jax.eval_shape(candidate.learner.adapt, state.params, support)
        assert info.inner_losses.shape == (expected,)
        assert candidate.num_test_inner_steps == candidate.headline_step == max(expected, 3)


@pytest.mark.parametrize("learner", [name for name, row in LEARNERS.items() if row.fills_head])
def test_a_head_that_is_filled_makes_no_inner_steps(learner, images):
    _, candidate, _ = _built(PRESET, images, learner)
    assert candidate.num_test_inner_steps == candidate.headline_step == 0


@pytest.mark.parametrize("learner", CLASSIFIERS)
def test_the_features_of_every_learner_can_be_computed(learner, images):
    experiment, candidate, state = _built(PRESET, images, learner)
    features_fn = candidate.model.features_fn
    assert features_fn is not None
    task = jax.tree.map(lambda leaf: leaf[0], step_tasks(experiment, 0))
    found = jax.eval_shape(
        lambda params: features_fn(
            candidate.learner.adapt(params, task.support, num_inner_steps=0)[0], task.query
        ),
        state.params,
    )
    assert found.shape == (6, 4)


@pytest.mark.parametrize(
    ("learner", "norm"),
    [
        ("maml_plus_plus", "per_step"),
        # Each learner with one of them, in turn.
        *((name, ("inductive", "running")[i % 2]) for i, name in enumerate(CARRY_STATE)),
    ],
)
def test_learners_carry_the_statistics_of_a_normalization(learner, norm, images):
    preset = presets.override(PRESET, norm=norm)
    experiment, candidate, state = _built(preset, images, learner)
    task = jax.tree.map(lambda leaf: leaf[0], step_tasks(experiment, 0))
    _, info = jax.jit(candidate.learner.loss)(state.params, task, state=state.state)
    assert jax.tree.structure(info.state) == jax.tree.structure(state.state)
    for after, before in zip(*map(jax.tree.leaves, (info.state, state.state)), strict=True):
        assert after.shape == before.shape
        assert np.any(np.asarray(after) != np.asarray(before))


@pytest.mark.parametrize("learner", [name for name in CLASSIFIERS if LEARNERS[name].has_order])
def test_the_exact_order_costs_more_than_the_first(learner, images):
    flops = {}
    for order in learners.ADJOINTS:
        experiment, candidate, state = _built(PRESET, images, learner, order)
        task = jax.tree.map(lambda leaf: leaf[0], step_tasks(experiment, 0))
        gradient = jax.grad(candidate.learner.loss, has_aux=True)
        flops[order] = diagnostics.count_flops(gradient, state.params, task)
    assert flops["exact"] > 1.05 * flops["first"]


@pytest.mark.parametrize("learner", [name for name in CLASSIFIERS if not LEARNERS[name].has_order])
def test_an_order_that_does_nothing_is_refused(learner, images):
    with pytest.raises(ValueError, match=f"{learner!r} has no order"):
        _built(PRESET, images, learner, order="first")


@pytest.mark.parametrize(
    "learner", sorted(set(CLASSIFIERS) - set(learners.of_domain("regression")))
)
def test_a_classifier_refuses_regression(learner):
    with pytest.raises(ValueError, match=f"{learner!r} is for classification, but sinusoid is"):
        _built(REGRESSION, None, learner)


@pytest.mark.parametrize("learner", [n for n, row in LEARNERS.items() if not row.takes_state])
def test_a_learner_without_state_refuses_statistics(learner):
    preset = presets.override(PRESET, norm="running")
    with pytest.raises(ValueError, match=f"{learner!r} does not support norm='running'"):
        learners.check(preset, learner, "exact")


@pytest.mark.parametrize("learner", ["maml", "cavia", "fine_tuning"])
def test_a_learner_of_regression_takes_a_step(learner):
    experiment, candidate, state = _built(REGRESSION, None, learner)
    tasks = step_tasks(experiment, 0)
    state, metrics = jax.jit(
        lambda state: jaxmaml.meta_step(candidate.learner, experiment.optimizer, state, tasks)
    )(state)
    assert np.isfinite(metrics["loss"])
    assert metrics["grad_norm"] > 0


def test_class_numbers_are_needed_for_classification_only():
    assert learners.needs_class_numbers(PRESET, "fine_tuning")
    assert not learners.needs_class_numbers(PRESET, "maml")
    assert not learners.needs_class_numbers(REGRESSION, "fine_tuning")


def test_an_unknown_learner_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'fomaml'"):
        learners.resolve("fomal")
