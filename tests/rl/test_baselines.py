"""Advantages against their definition, and the baseline against what it can represent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmaml import rl
from jaxmaml.rl.baselines import masked_mean


def _trajectories(rewards, mask=None, observations=None):
    rewards = jnp.asarray(rewards, jnp.float32)
    mask = jnp.ones_like(rewards) if mask is None else jnp.asarray(mask, jnp.float32)
    if observations is None:
        observations = jnp.zeros((*rewards.shape, 1))
    return rl.Trajectories(observations, jnp.zeros_like(rewards), rewards * mask, rewards, mask)


def test_advantages_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 6)), rng.normal(size=(2, 6))
    mask = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    found = rl.advantages(
        _trajectories(rewards, mask),
        jnp.asarray(values),
        discount=0.9,
        gae_lambda=0.7,
        normalize=False,
    )
    for i, length in enumerate(mask.sum(1)):
        for t in range(6):
            after = [*values[i, :length], 0.0]
            errors = [rewards[i, k] + 0.9 * after[k + 1] - after[k] for k in range(length)]
            wanted = sum((0.9 * 0.7) ** (k - t) * errors[k] for k in range(t, length))
            np.testing.assert_allclose(found[i, t], wanted, atol=1e-5)


def test_normalized_advantages_have_mean_zero_and_deviation_one_over_the_steps_that_count():
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    rewards = np.random.default_rng(0).normal(size=mask.shape)
    found = np.asarray(rl.advantages(_trajectories(rewards, mask), jnp.zeros(mask.shape)))
    assert (found[mask == 0] == 0).all()
    counted = found[mask == 1]
    assert counted.mean() == pytest.approx(0, abs=1e-6)
    assert counted.std() == pytest.approx(1, abs=1e-3)


def test_the_baseline_predicts_what_is_linear_in_its_features():
    """Returns that depend on the observation and the time only are predicted."""
    observations = jax.random.normal(jax.random.key(0), (30, 20, 2))
    time = jnp.arange(20) / 100
    returns = 2 * observations[..., 0] - observations[..., 1] ** 2 + 3 * time**2 - 1
    rewards = returns - 0.5 * jnp.pad(returns[:, 1:], ((0, 0), (0, 1)))
    values = rl.linear_baseline(_trajectories(rewards, observations=observations), 0.5)
    np.testing.assert_allclose(values, returns, atol=0.02)


def test_the_baseline_of_equal_observations_is_finite():
    """One-hot observations sum to the constant: the normal equations are singular."""
    observations = jax.nn.one_hot(jnp.zeros((4, 5), int), 3)
    values = rl.linear_baseline(_trajectories(jnp.ones((4, 5)), observations=observations), 1.0)
    np.testing.assert_allclose(values, [[5, 4, 3, 2, 1]] * 4, atol=0.1)


def test_steps_after_the_end_do_not_change_the_baseline():
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]])
    cut = rl.linear_baseline(_trajectories(np.ones((2, 3))), 1.0)
    padded = rl.linear_baseline(_trajectories(np.ones((2, 5)), mask), 1.0)
    np.testing.assert_allclose(padded[:, :3], cut, atol=1e-3)
    assert (padded[:, 3:] == 0).all()


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.bool, jnp.bfloat16])
def test_a_narrow_type_of_the_observations_changes_nothing(dtype):
    keys = jax.random.split(jax.random.key(0))
    rewards = jax.random.normal(keys[0], (4, 300))
    seen = jax.random.randint(keys[1], (4, 300, 2), 0, 2 if dtype == jnp.bool else 6)
    found, expected = (
        rl.linear_baseline(_trajectories(rewards, observations=seen.astype(kind)), 0.99)
        for kind in (dtype, jnp.float32)
    )
    np.testing.assert_array_equal(found, expected)


def test_numbers_of_other_steps_than_the_mask_are_refused():
    with pytest.raises(ValueError, match=r"a step has one number.* \[4, 4\]; got \[4, 4, 1\]"):
        masked_mean(jnp.ones((4, 4, 1)), jnp.ones((4, 4)))
