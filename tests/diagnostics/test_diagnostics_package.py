"""Every diagnostic of one task can be compiled and batched."""

import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest
from bowls import (
    FIRST,
    smooth_features,
    task_at,
    unbiased,
)

import jaxmaml
from jaxmaml import diagnostics


def _reuse(problem, task):
    adapted, _ = jaxmaml.maml(problem.loss_fn, optax.sgd(1.0), 2).adapt(
        problem.params, task.support
    )
    return diagnostics.feature_reuse(smooth_features, problem.params, adapted, task.query)


def _learner(problem, num_inner_steps=2, **options):
    return jaxmaml.maml(problem.loss_fn, optax.sgd(1.0), num_inner_steps, **options)


OF_A_TASK: dict[str, Any] = {
    "inner_losses": lambda problem, task: diagnostics.inner_losses(
        _learner(problem), problem.loss_fn, problem.params, task
    ),
    "update_norms": lambda problem, task: diagnostics.update_norms(
        _learner(problem), problem.params, task.support
    ),
    "agreement_by_step": lambda problem, task: diagnostics.agreement_by_step(
        functools.partial(_learner, problem, adjoint=FIRST), functools.partial(_learner, problem),
        problem.params, task, (1, 2),
    ),
    "metric_by_permutation": lambda problem, task: diagnostics.metric_by_permutation(
        _learner(problem), problem.loss_fn, problem.params, task, diagnostics.label_permutations(3)
    ),
    "feature_reuse": _reuse,
}  # fmt: skip


@pytest.mark.parametrize("name", OF_A_TASK)
def test_what_is_said_of_one_task_is_compiled_and_batched(name):
    problem = unbiased()
    function = functools.partial(OF_A_TASK[name], problem)
    with jax.numpy_rank_promotion("raise"):
        batched = jax.jit(jax.vmap(function))(problem.tasks)
    for i in range(2):
        alone = jax.jit(function)(task_at(problem.tasks, i))
        assert jax.tree.structure(alone) == jax.tree.structure(batched)
        for one, many in zip(jax.tree.leaves(alone), jax.tree.leaves(batched), strict=True):
            np.testing.assert_allclose(many[i], one, rtol=1e-4, atol=1e-5)
