"""The head of a model in its parameters."""

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
