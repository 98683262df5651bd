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
