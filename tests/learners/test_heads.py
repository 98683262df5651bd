"""The head of a model in its parameters."""

import jax
import jax.numpy as jnp
import pytest
from learner_cases import learner_of, one_task
from problems import smooth

from jaxmaml.learners import heads


def test_a_head_without_a_bias_cannot_hold_distances():
    problem = smooth()
    params, task = one_task(problem)
    params = {**params, "head": {"kernel": params["head"]["kernel"]}}
    with pytest.raises(ValueError, match="has no bias"):
        heads.fill(params, "head", jnp.zeros((8, 3)), jnp.zeros(3))
    with pytest.raises(ValueError, match="has no bias"):
        learner_of("protonet").adapt(params, task.support)


@pytest.mark.parametrize(
    "wrong", [{"targets": [0, -1, 1]}, {"targets": [0, 2, 1]}, {"weights": [1, -1, 1]}]
)
def test_a_wrong_target_or_weight_fills_no_head(wrong):
    batch = {"targets": jnp.array([0, 1, 1])} | {name: jnp.array(x) for name, x in wrong.items()}
    with pytest.raises(ValueError, match=r"classes in 0\.\.1; got|weights must be 0 or more"):
        heads.prototypes(jnp.ones((3, 4)), batch, 2)
    means = jax.jit(heads.prototypes, static_argnums=2)(jnp.ones((3, 4)), batch, 2)
    assert jnp.isnan(means).any()


def test_padding_may_have_any_target():
    batch = {"targets": jnp.array([0, -1, 1]), "weights": jnp.array([1, 0, 1])}
    assert heads.prototypes(jnp.ones((3, 4)), batch, 2).tolist() == [[1.0] * 4] * 2
