"""Learned inner optimizers: any learner takes one, and rates exist for what is adapted only."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import smooth

import jaxmaml

WRONG: Any = "tensor"
RATES = jaxmaml.learned_sgd(0.1, granularity="layer", num_steps=2)


def _task(problem):
    return jax.tree.map(lambda leaf: leaf[0], problem.tasks)


@pytest.mark.parametrize(
    "make", [lambda loss: jaxmaml.meta_sgd(loss, 1),
             lambda loss: jaxmaml.meta_curvature(loss, optax.sgd(0.1), 1)],
)  # fmt: skip
def test_parameters_may_be_numbers_of_python(make):
    learner = make(lambda params, batch: jnp.mean((params["w"] - batch) ** 2))
    state = jaxmaml.init_state(learner, optax.sgd(0.1), {"w": 1.0})
    tasks = jaxmaml.Task(jnp.ones((2, 3)), jnp.zeros((2, 3)))
    _, metrics = jaxmaml.meta_step(learner, optax.sgd(0.1), state, tasks)
    assert np.isfinite(metrics["loss"])


def test_parameters_that_are_not_adapted_have_no_rates():
    problem = smooth()
    learner = jaxmaml.meta_sgd(problem.loss_fn, 1, mask=lambda path: path.startswith("head"))
    meta_params = learner.init(problem.params)
    assert sorted(jaxmaml.learned_rates(meta_params)) == ["head/bias", "head/kernel"]
    grads, _ = jax.grad(learner.loss, has_aux=True)(meta_params, _task(problem))
    assert all(np.any(rate) for rate in jaxmaml.learned_rates(grads).values())
    curved = jaxmaml.meta_curvature(
        problem.loss_fn, optax.sgd(0.1), 1, mask=lambda p: p == "a/bias"
    )
    assert [len(m) for m in curved.init(problem.params).learned["hyperparams"]] == [1]


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda p: jaxmaml.unicorn(p.loss_fn, RATES, 2), {"head", "hyperparams"}),
        (lambda p: jaxmaml.cavia(p.loss_fn, RATES, 2, context="a/bias"), {"hyperparams"}),
        (lambda p: jaxmaml.proto_maml(p.loss_fn, RATES, 2, p.features_fn), {"hyperparams"}),
        (lambda p: jaxmaml.anil(p.loss_fn, RATES, 2), {"hyperparams"}),
        (lambda p: jaxmaml.meta_curvature(p.loss_fn, RATES, 2), {"hyperparams"}),
    ],
    ids=["unicorn", "cavia", "proto_maml", "anil", "meta_curvature"],
)
def test_every_learner_with_an_inner_loop_can_learn_its_rates(make, names):
    problem = smooth()
    learner = make(problem)
    meta_params = learner.init(problem.params)
    assert set(meta_params.learned) == names
    grads, _ = jax.jit(jax.grad(learner.loss, has_aux=True))(meta_params, _task(problem))
    rates = jaxmaml.learned_rates(grads)
    found = {path: rate for path, rate in rates.items() if not path.startswith("curvature")}
    assert found
    assert all(rate.shape == (2,) and np.any(rate) for rate in found.values())


@pytest.mark.parametrize("name", ["reptile", "fine_tuning", "imaml"])
def test_learners_that_differentiate_no_inner_step_refuse_a_learned_optimizer(name):
    with pytest.raises(ValueError, match=f"{name} differentiates no inner step"):
        getattr(jaxmaml, name)(smooth().loss_fn, RATES, 2)


def test_rates_are_read_back_by_layer_from_a_meta_state():
    problem = smooth()
    learner = jaxmaml.meta_sgd(problem.loss_fn, 5, inner_lr=0.4, granularity="layer", per_step=True)
    meta_state = jaxmaml.init_state(learner, optax.adam(1e-3), problem.params)
    rates = jaxmaml.learned_rates(meta_state)
    assert sorted(rates) == ["a/bias", "a/kernel", "head/bias", "head/kernel"]
    np.testing.assert_allclose(rates["head/kernel"], np.full(5, 0.4), rtol=1e-6)
    with pytest.raises(ValueError, match="hold no learned inner optimizer"):
        jaxmaml.learned_rates(problem.params)


def test_hyperparameters_may_depend_on_the_parameters_and_keep_their_type():
    optimizer = jaxmaml.learned_optimizer(
        lambda h: optax.sgd(h["lr"]), lambda params: {"lr": jnp.full((), 0.5, jnp.bfloat16)}
    )
    assert optimizer.init({"w": jnp.ones(3)})["lr"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jaxmaml.learned_sgd(0.1, granularity=WRONG), "granularity must be one of"),
        (lambda: jaxmaml.learned_sgd(0.1, num_steps=0), "num_steps must be an integer, 1 or more"),
        (
            lambda: jaxmaml.meta_sgd(smooth().loss_fn, 0, per_step=True),
            "per_step=True needs at least one inner step",
        ),
        (lambda: jaxmaml.maml_plus_plus(smooth().loss_fn, 0), "at least one inner step"),
        (
            lambda: jaxmaml.maml_plus_plus(smooth().loss_fn, 1, query_weights="papr"),
            "query_weights must be one of paper; got 'papr'",
        ),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
