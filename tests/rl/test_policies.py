"""Distributions against their definitions, and policies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmaml import rl

NORMALS = [
    rl.Normal(jnp.array([[0.3, -1.0]]), jnp.array([0.1, -0.5])),
    rl.Normal(jnp.array([[-0.2, 0.5]]), jnp.array([-0.3, 0.4])),
]
CATEGORICALS = [
    rl.Categorical(jnp.array([[0.5, -1.0, 2.0]])), rl.Categorical(jnp.array([[1.0, 1.0, 0.0]]))
]  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second"), [NORMALS, CATEGORICALS], ids=["normal", "categorical"]
)
def test_divergence_and_entropy_are_means_of_log_likelihoods(first, second):
    keys = jax.random.split(jax.random.key(0), 200_000)
    actions = jax.vmap(first.sample)(keys)
    own, other = (jax.vmap(d.log_prob)(actions).mean() for d in (first, second))
    np.testing.assert_allclose(first.kl(second)[0], own - other, atol=0.01)
    np.testing.assert_allclose(first.entropy()[0], -own, atol=0.01)
    np.testing.assert_allclose(first.kl(first), 0, atol=1e-6)


def test_likelihoods_sum_to_one():
    grid = jnp.linspace(-6, 6, 401)
    points = jnp.stack(jnp.meshgrid(grid, grid), axis=-1).reshape(-1, 1, 2)
    density = jnp.exp(jax.vmap(NORMALS[0].log_prob)(points)).sum() * (grid[1] - grid[0]) ** 2
    assert density == pytest.approx(1, abs=1e-3)
    masses = jnp.exp(jax.vmap(CATEGORICALS[0].log_prob)(jnp.arange(3)[:, None]))
    assert masses.sum() == pytest.approx(1, abs=1e-6)


def test_a_standard_deviation_of_zero_stays_finite():
    policy = rl.GaussianPolicy(2, 1, hidden_sizes=(3,), log_std=-1e9, rngs=nnx.Rngs(0))
    distribution = policy(jnp.ones((4, 2)))
    assert np.isfinite(distribution.log_prob(distribution.mean)).all()


@pytest.mark.parametrize("environment", [rl.navigation_2d(), rl.tabular_mdp(4, 3)])
def test_a_policy_takes_any_leading_axes(environment):
    policy_fn, params = rl.policy(environment, hidden_sizes=(5,), rngs=nnx.Rngs(0))
    shape = (2, 3, environment.observation_size)
    observations = jax.random.normal(jax.random.key(0), shape)
    whole = policy_fn(params, observations)
    one = policy_fn(params, observations[1, 2])
    np.testing.assert_allclose(whole[0][1, 2], one[0], rtol=1e-5)  # the mean or the logits


def test_an_action_that_cannot_be_taken_counts_nothing():
    both, one = (rl.Categorical(jnp.array(logits)) for logits in ([0.0, 0.0], [0.0, -jnp.inf]))
    assert (one.entropy(), one.kl(one), both.kl(one)) == (0, 0, jnp.inf)
    np.testing.assert_allclose(one.kl(both), jnp.log(2), rtol=1e-6)
    values = lambda logits: rl.Categorical(logits).entropy() + rl.Categorical(logits).kl(both)
    assert np.isfinite(jax.grad(values)(one.logits)).all()
