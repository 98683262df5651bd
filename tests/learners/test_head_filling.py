"""Learners that fill in a head: no second derivatives, padding, any number of ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learner_cases import SGD, learner_of, meta_gradient, one_task
from problems import smooth

import jaxmaml
from jaxmaml import diagnostics


@pytest.mark.parametrize("name", ["reptile", "protonet"])
def test_no_second_derivatives_are_computed(name):
    """In the jaxpr: no more operations than first derivatives take."""
    problem = smooth()
    params, task = one_task(problem)
    forward = diagnostics.count_flops(problem.loss_fn, params, task.support)
    gradient = diagnostics.count_flops(jax.grad(problem.loss_fn), params, task.support)
    learner = {
        "reptile": jaxmaml.reptile(problem.loss_fn, SGD, 3, join_query=False),
        "protonet": jaxmaml.protonet(problem.loss_fn, problem.features_fn),
    }[name]
    found = diagnostics.count_flops(lambda params: meta_gradient(learner, params, task), params)
    most = {"reptile": 3 * gradient + forward, "protonet": 2 * 3 * forward}[name]
    assert found <= most
    second = diagnostics.count_flops(
        lambda params: meta_gradient(jaxmaml.maml(problem.loss_fn, SGD, 3), params, task), params
    )
    assert second > 3 * gradient + forward + gradient


@pytest.mark.parametrize("name", ["protonet", "r2d2"])
def test_padded_examples_have_no_part_in_the_head(name):
    problem = smooth()
    params, task = one_task(problem)
    learner = getattr(jaxmaml, name)(problem.loss_fn, problem.features_fn)
    meta_params = learner.init(params)
    padded = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:2]]), task.support)
    padded["inputs"] = padded["inputs"].at[6:].set(jnp.nan)
    padded["weights"] = jnp.array([1.0] * 6 + [0.0] * 2)
    expected, found = (
        learner.adapt(meta_params, batch)[0]["head"] for batch in (task.support, padded)
    )
    for leaf, like in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, like, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["protonet", "r2d2", "proto_maml", "unicorn"])
@pytest.mark.parametrize("way", [2, 5])
def test_learners_without_a_fixed_head_serve_any_number_of_ways(name, way):
    problem = smooth()
    rest = {"proto_maml": (SGD, 2, problem.features_fn), "unicorn": (SGD, 2)}
    args = rest.get(name, (problem.features_fn,))
    trained, served = (getattr(jaxmaml, name)(problem.loss_fn, *args, way=w) for w in (None, way))
    support = {"inputs": jnp.ones((way, 4)), "targets": jnp.arange(way)}
    meta_params = trained.init(problem.params)
    adapted = jax.eval_shape(lambda: served.adapt(meta_params, support)[0])
    assert adapted["head"]["kernel"].shape == (8, way)
    assert adapted["head"]["bias"].shape == (way,)


def test_learners_without_steps_refuse_to_make_some():
    params, task = one_task(smooth())
    with pytest.raises(ValueError, match="no inner steps"):
        learner_of("protonet").adapt(params, task.support, num_inner_steps=2)
