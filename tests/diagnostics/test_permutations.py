"""Permuted labels: the list of them, and the metric for each."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bowls import (
    curved_loss,
    task_at,
)
from problems import smooth

import jaxmaml
from jaxmaml import diagnostics
from jaxmaml.types import Task


@pytest.mark.parametrize("way", [1, 2, 5])
def test_all_permutations_are_listed_once(way):
    rows = {tuple(row) for row in diagnostics.label_permutations(way).tolist()}
    assert len(rows) == len(diagnostics.label_permutations(way)) == math.factorial(way)
    assert all(sorted(row) == list(range(way)) for row in rows)
    assert diagnostics.label_permutations(way)[0].tolist() == list(range(way))


def test_permutations_are_drawn():
    draw = functools.partial(diagnostics.label_permutations, 20, num_permutations=30)
    rows = draw(key=jax.random.key(0))
    assert rows.shape == (30, 20)
    np.testing.assert_array_equal(np.sort(rows), np.tile(np.arange(20), (30, 1)))
    assert len({tuple(row) for row in rows.tolist()}) == 30
    np.testing.assert_array_equal(rows, draw(key=jax.random.key(0)))


@pytest.mark.parametrize(
    ("way", "options", "message"),
    [
        (0, {}, "way must be an integer, 1 or more"),
        (9, {}, "362,880"),
        (3, {"num_permutations": 2}, "given together"),
        (3, {"key": jax.random.key(0)}, "given together"),
        (
            3,
            {"key": jax.random.key(0), "num_permutations": 0},
            "num_permutations must be an integer, 1 or more",
        ),
    ],
)
def test_permutations_that_cannot_be_listed_or_drawn_are_refused(way, options, message):
    with pytest.raises(ValueError, match=message):
        diagnostics.label_permutations(way, **options)


def by_permutation(problem, permutations, metric_fn, *, params=None, task=None, **options):
    learner = jaxmaml.maml(problem.loss_fn, optax.sgd(1.0), 2)
    params = problem.params if params is None else params
    task = task_at(problem.tasks, 0) if task is None else task
    return diagnostics.metric_by_permutation(
        learner, metric_fn, params, task, permutations, **options
    )


@functools.cache
def _losses_of_relabeled_tasks():
    """The query loss after each inner step, a row for each permutation."""
    problem = smooth()
    task, learner = task_at(problem.tasks, 0), jaxmaml.maml(problem.loss_fn, optax.sgd(1.0), 2)

    @jax.jit
    def losses(task):
        view = lambda adapted, state: problem.loss_fn(adapted, task.query)
        return learner.trace(problem.params, task.support, view)

    return [
        losses(Task(*(batch | {"targets": permutation[batch["targets"]]} for batch in task)))
        for permutation in diagnostics.label_permutations(3)
    ]


@pytest.mark.parametrize(
    "chunk_size",
    [
        pytest.param("auto", marks=pytest.mark.slow),
        None,
        pytest.param(1, marks=pytest.mark.slow),
        4,
    ],
)
def test_the_metric_of_each_permutation_is_that_of_the_relabeled_task(chunk_size):
    problem, permutations = smooth(), diagnostics.label_permutations(3)
    metric_fn = lambda adapted, query: {"loss": problem.loss_fn(adapted, query)}
    found = by_permutation(problem, permutations, metric_fn, chunk_size=chunk_size)
    assert found["loss"].shape == (6, 3)
    np.testing.assert_allclose(found["loss"], _losses_of_relabeled_tasks(), rtol=1e-5)


def test_nothing_hangs_on_the_labels_of_a_head_that_starts_alike_for_all():
    problem = smooth()
    alike = problem.params | {"head": jax.tree.map(jnp.zeros_like, problem.params["head"])}
    rows = functools.partial(
        by_permutation, problem, diagnostics.label_permutations(3), problem.loss_fn
    )
    np.testing.assert_allclose(rows(params=alike).std(axis=0), 0, atol=1e-6)
    assert rows().std(axis=0).min() > 0.03


def test_state_reaches_a_permuted_task():
    """A loss whose state counts inner steps, and reads the labels that it is given."""

    @jaxmaml.with_state
    def loss_fn(params, batch, state):
        return jnp.mean((params - batch["targets"]) ** 2) + state, state + 1

    learner = jaxmaml.maml(loss_fn, optax.sgd(0.5), 2)
    task = Task(support={"targets": jnp.array([2])}, query={"targets": jnp.array([0])})

    @jaxmaml.with_state
    def metric_fn(adapted, query, state):
        return 100 * adapted + 10 * query["targets"][0] + state, state

    found = diagnostics.metric_by_permutation(
        learner, metric_fn, jnp.array(0.0), task, [[0, 1, 2], [1, 2, 0]], state=jnp.array(0.0),
        num_inner_steps=1,
    )  # fmt: skip
    # One step of rate 1/2 on a squared distance lands on the support's label.
    np.testing.assert_allclose(found, [[0, 201], [10, 11]], rtol=1e-6)


TARGETS = {"targets": jnp.array([0, 1, 2])}


@pytest.mark.parametrize(
    ("support", "permutations", "error", "message"),
    [
        (TARGETS, [[0, 1, 1]], ValueError, "must hold 0..2 once"),
        (TARGETS, [[1, 2, 3]], ValueError, "must hold 0..2 once"),
        (TARGETS, [0, 1, 2], ValueError, r"integers \[num_permutations, way\]"),
        (TARGETS, [[0.0, 1.0, 2.0]], ValueError, r"integers \[num_permutations, way\]"),
        (TARGETS, [[1, 0]], ValueError, r"support's targets must be in 0..1"),
        ({"inputs": jnp.zeros(3)}, [[0, 1]], ValueError, "a mapping with integer 'targets'"),
        (jnp.zeros(3), [[0, 1]], ValueError, "a mapping with integer 'targets'"),
        ({"targets": jnp.eye(2)}, [[0, 1]], TypeError, "support's targets must be integers"),
    ],
)
def test_what_cannot_be_permuted_is_refused(support, permutations, error, message):
    with pytest.raises(error, match=message):
        by_permutation(smooth(), permutations, curved_loss, task=Task(support, TARGETS))
