import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmaml import metrics, scores


def test_accuracy_has_one_home():
    assert metrics.accuracy is scores.accuracy


@pytest.mark.parametrize("weights", [None, np.array([1.0, 3.0])])
def test_further_axes_are_averaged_within_an_example(weights):
    logits = jnp.zeros((2, 4, 5)).at[..., 2].set(1)
    targets = jnp.array([[2, 2, 2, 0], [2, 0, 1, 3]])
    expected = np.average([3 / 4, 1 / 4], weights=weights)
    assert scores.accuracy(logits, targets, weights) == pytest.approx(expected)
    dead = logits.at[0, 3, 1].set(jnp.nan)
    assert np.isnan(scores.accuracy(dead, targets, weights))
    assert scores.accuracy(dead, targets, jnp.array([0.0, 1.0])) == pytest.approx(1 / 4)


@pytest.mark.parametrize(
    ("targets", "weights", "error", "message"),
    [
        (np.zeros((2, 1), int), None, ValueError, r"targets must be \[num_examples\]"),
        (np.zeros(1, int), None, ValueError, r"targets must be \[num_examples\]"),
        (np.eye(2, dtype=int), None, ValueError, r"targets must be \[num_examples\]"),
        (np.zeros(2), None, TypeError, "targets must be integer class labels, got float"),
        (np.zeros(2, int), np.ones(1), ValueError, r"weights must be \[num_examples\] = \[2\]"),
        (np.array([0, 2]), None, ValueError, "targets must be classes in 0..1; got 2"),
        (np.array([0, -1]), None, ValueError, "targets must be classes in 0..1; got -1"),
        (np.array([0, 1]), np.array([2.0, -1.0]), ValueError, "weights must be 0 or more"),
    ],
)
def test_accuracy_refuses_what_it_would_score_wrong(targets, weights, error, message):
    logits = jnp.array([[2.0, 1.0], [0.0, 3.0]])
    with pytest.raises(error, match=message):
        scores.accuracy(logits, targets, weights)
    traced = jax.jit(scores.accuracy)
    if ("got" in message and error is ValueError) or "0 or more" in message:
        assert np.isnan(traced(logits, targets, weights))
    else:
        with pytest.raises(error, match=message):
            traced(logits, targets, weights)


def test_accuracy_refuses_integer_logits():
    with pytest.raises(TypeError, match="logits must be floating-point"):
        scores.accuracy(jnp.eye(2, dtype=int), jnp.array([0, 1]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("weights", [None, 2e4])
def test_half_precision_is_scored_exactly(dtype, weights):
    logits = jnp.array([[1.0, 0.0]] * 5, dtype)
    weights = None if weights is None else jnp.full(5, weights)
    found = scores.accuracy(logits, jnp.array([0, 0, 0, 1, 1]), weights)
    assert found == jnp.float32(0.6)
