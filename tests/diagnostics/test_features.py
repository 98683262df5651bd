"""Alignment of features against values computed by hand."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bowls import smooth_features, task_at
from problems import smooth

import jaxmaml
from jaxmaml import diagnostics

CROSS = [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([-1.0, 0.0, 1.0], [1.0, -2.0, 1.0], 0),
        ([0.0, 1.0, 2.0], [0.0, 0.0, 3.0], 9 / 12),
        # ||Y'X||² = 4, ||X'X|| = 2 sqrt(2), ||Y'Y|| = 2.
        (CROSS, [[1.0], [-1.0], [0.0], [0.0]], math.sqrt(0.5)),
        (CROSS, [[7.0, 1.0], [7.0, -1.0], [8.0, 0.0], [6.0, 0.0]], 1),
        # More features than examples.
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]], 1),
        # The mean of seven 0.3 is not 0.3.
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [0.3] * 7, math.nan),
        ([1.0], [2.0], math.nan),
    ],
)
def test_cka_by_hand(x, y, expected):
    x, y = jnp.array(x), jnp.array(y)
    for found in (diagnostics.cka(x, y), diagnostics.cka(y, x)):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_features", [2, 30])
def test_cka_is_the_formula_of_the_paper(num_features):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(10, 3)), rng.normal(size=(10, num_features))
    x, y = x - x.mean(0), y - y.mean(0)
    norm = np.linalg.norm
    expected = norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y))
    found = diagnostics.cka(jnp.asarray(x + 3, jnp.float32), jnp.asarray(y - 5, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert 0.1 < expected < 0.9


def test_cka_sees_neither_rotation_nor_scale_nor_shift():
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    x, y, (rotation, _) = draw(10, 4), draw(10, 3), jnp.linalg.qr(draw(4, 4))
    other = 1e12 * x @ rotation + 1e12
    np.testing.assert_allclose(diagnostics.cka(other, y), diagnostics.cka(x, y), rtol=1e-4)
    image = x.reshape(10, 2, 1, 2)
    np.testing.assert_array_equal(diagnostics.cka(image, y), diagnostics.cka(x, y))
    assert not np.isclose(
        diagnostics.cka(x * jnp.array([[1, 1, 1, 9.0]]), y), diagnostics.cka(x, y)
    )


@pytest.mark.parametrize("blank", [0.0, math.nan])
def test_padding_does_not_count_and_a_weight_of_two_is_an_example_twice(blank):
    rng = np.random.default_rng(2)
    x, y = (jnp.asarray(rng.normal(size=(6, 3)), jnp.float32) for _ in range(2))
    padded = [jnp.concatenate([jnp.full((2, 3), blank), features]) for features in (x, y)]
    weights = jnp.array([0, 0, 1, 1, 1, 1, 1, 2.0])
    expected = diagnostics.cka(*(jnp.concatenate([features, features[-1:]]) for features in (x, y)))
    np.testing.assert_allclose(diagnostics.cka(*padded, weights=weights), expected, rtol=1e-5)


def test_cka_of_half_precision_is_computed_in_single():
    x, y = jnp.array([0.0, 1.0, 2.0], jnp.bfloat16), jnp.array([0.0, 0.0, 300.0], jnp.float16)
    found = diagnostics.cka(x, y)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 0.75, rtol=1e-6)


@pytest.mark.parametrize(
    ("x", "y", "weights", "message"),
    [
        ((3, 2), (4, 2), None, r"x \[3, 2\], y \[4, 2\]"),
        ((), (), None, r"same, positive number of examples"),
        ((0, 2), (0, 2), None, r"same, positive number of examples"),
        ((3, 2), (3, 2), (2,), r"weights \[2\]"),
        ((3, 2), (3, 2), (3, 1), r"weights must be \[num_examples\]"),
    ],
)
def test_features_of_other_examples_are_not_compared(x, y, weights, message):
    weights = None if weights is None else jnp.ones(weights)
    with pytest.raises(ValueError, match=message):
        diagnostics.cka(jnp.ones(x), jnp.ones(y), weights=weights)


def test_features_are_reused_where_they_are_not_adapted():
    problem = smooth()
    task = task_at(problem.tasks, 0)
    learner = jaxmaml.maml(problem.loss_fn, optax.sgd(1.0), 3, mask=lambda path: "head" in path)
    adapted, _ = learner.adapt(problem.params, task.support)
    reuse = diagnostics.feature_reuse(smooth_features, problem.params, adapted, task.query)
    np.testing.assert_allclose(reuse["a"], 1, rtol=1e-6)
    logits = [smooth_features(p, task.query)["head"][0] for p in (problem.params, adapted)]
    np.testing.assert_allclose(reuse["head"][0], diagnostics.cka(*logits))
    assert reuse["head"][0] < 0.99
    weights = jnp.array([1, 1, 1, 1, 1, 0.0])
    counted = diagnostics.feature_reuse(
        smooth_features, problem.params, adapted, task.query, weights=weights
    )
    logits = [values[:5] for values in logits]
    np.testing.assert_allclose(counted["head"][0], diagnostics.cka(*logits), rtol=1e-5)
