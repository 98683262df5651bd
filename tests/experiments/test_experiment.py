"""An experiment: the same one for the same preset and seed, the same start for every learner."""

from typing import Any

import jax
import numpy as np
import pytest

from experiments.tiny import PRESET, REGRESSION
from jaxmaml.experiments import presets
from jaxmaml.experiments.candidates import Spec
from jaxmaml.experiments.experiment import (
    build_candidate,
    build_experiment,
    init_state,
    key_of,
    scored_tasks,
    step_tasks,
)
from jaxmaml.sources import batches


def _build(preset=REGRESSION, seed=0, **options):
    return build_experiment(preset, seed=seed, num_test_tasks=2, **options)


def _assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_seed_gives_the_parameters_and_the_training_tasks():
    one, again, other = _build(), _build(), _build(seed=1)
    _assert_equal(one.network.params, again.network.params)
    _assert_equal(step_tasks(one, 3), step_tasks(again, 3))
    with pytest.raises(AssertionError):
        _assert_equal(one.network.params, other.network.params)
    with pytest.raises(AssertionError):
        _assert_equal(step_tasks(one, 3), step_tasks(other, 3))


def test_the_scored_tasks_do_not_depend_on_the_seed():
    found = [next(scored_tasks(_build(seed=seed), "test", 2)) for seed in (0, 1)]
    _assert_equal(*found)


@pytest.mark.parametrize("seed", [0, 1, 2, 2**31, 2**32 - 1])
def test_no_key_of_an_experiment_is_the_root_key_of_a_seed(seed):
    names = ("parameters", "training tasks", "parameters of a learner", "val tasks", "test tasks")
    keys = [tuple(jax.random.key_data(key_of(seed, name)).tolist()) for name in names]
    assert len(set(keys)) == len(names)
    # The root key of a seed is (0, seed).
    assert all(first != 0 for first, _ in keys)
    # The keys that are split from a root key are those folded into it with small numbers.
    split = jax.random.key_data(jax.random.split(jax.random.key(seed), 100)).tolist()
    assert not {tuple(key) for key in split} & set(keys)


def test_the_training_tasks_of_no_seed_are_those_of_the_test():
    test = next(scored_tasks(_build(), "test", 2)).query["inputs"]
    for seed in (1, 2):
        source = _build(seed=seed).sources["test"]
        for key in (jax.random.key(seed), key_of(seed, "training tasks")):
            assert not np.array_equal(next(batches(source, key)).query["inputs"], test)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63 - 1, 1.5])
def test_a_seed_that_jax_would_wrap_is_refused(seed):
    with pytest.raises((ValueError, TypeError), match=r"^seed must be"):
        _build(seed=seed)


def test_the_parameters_that_only_one_learner_has_depend_on_the_seed():
    films = []
    for seed in (0, 1):
        experiment = _build(seed=seed)
        candidate = build_candidate(experiment, Spec("x", "exact", 0.1, "cavia"))
        films.append(np.asarray(init_state(experiment, candidate).params["film"]))
    assert not np.array_equal(*films)


def test_every_learner_starts_from_the_same_parameters():
    experiment = _build()
    starts = [
        init_state(experiment, build_candidate(experiment, Spec("x", order, 0.1, "maml")))
        for order in ("exact", "first")
    ]
    _assert_equal(*(state.params for state in starts))
    _assert_equal(starts[0].params, experiment.network.params)


def test_the_outer_optimizer_follows_the_preset():
    gradient = np.array([3.0, -0.1], np.float32)

    def updates(**changes):
        optimizer: Any = _build(presets.override(REGRESSION, **changes)).optimizer
        state, found = optimizer.init(gradient), []
        for _ in range(REGRESSION.num_outer_steps):
            update, state = optimizer.update(gradient, state, gradient)
            found.append(np.asarray(update))
        return found

    constant, cosine = updates(), updates(outer_schedule="cosine")
    np.testing.assert_allclose(constant[0], -1e-3 * np.sign(gradient), rtol=1e-3)
    np.testing.assert_allclose(cosine[0], constant[0], rtol=1e-5)
    assert abs(cosine[-1][0]) < 0.2 * abs(constant[-1][0])


def test_clipping_bounds_each_entry_of_the_meta_gradient():
    gradients = np.array([[100.0], [1.0]], np.float32)

    def second_update(clip):
        optimizer: Any = _build(presets.override(REGRESSION, outer_clip=clip)).optimizer
        state = optimizer.init(gradients[0])
        update: Any = None
        for gradient in gradients:
            update, state = optimizer.update(gradient, state, gradient)
        return float(np.asarray(update)[0])

    # Adam's second step follows 1 fully if the first gradient was clipped to 1.
    assert second_update(1.0) == pytest.approx(-1e-3, rel=1e-3)
    assert abs(second_update(0.0)) < 0.8e-3


def test_a_network_can_have_other_settings_than_the_tasks(images):
    tested = presets.override(PRESET, way=2)
    experiment = _build(tested, images=images, trained_as=PRESET)
    assert experiment.network.params["head"]["bias"].shape == (3,)
    assert int(step_tasks(experiment, 0).query["targets"].max()) == 1
