"""Advantages: the linear feature baseline and generalized advantage estimation."""

import jax
import jax.numpy as jnp

from jaxmaml import trees
from jaxmaml.rl.rollouts import Trajectories
from jaxmaml.types import Array, Scalar

REGULARIZATION = 1e-6
"""The weight of the ridge in the fit of the baseline, relative to the number of steps."""
ROUNDING = 1e-4
"""The least deviation of advantages, relative to the returns, that counts as one."""


def discounted_returns(rewards: Array, discount: Scalar) -> Array:
    """Returns the discounted sum of the rewards from each step on.

    Args:
        rewards: `[..., horizon]`.
        discount: in 0..1.

    Example:
        >>> import jax.numpy as jnp
        >>> discounted_returns(jnp.array([1.0, 1.0, 1.0]), 0.5).tolist()
        [1.75, 1.5, 1.0]
    """
    rewards = trees.in_float32(rewards)
    return _backward_sum(rewards, jnp.asarray(discount, rewards.dtype))


def linear_baseline(trajectories: Trajectories, discount: Scalar) -> Array:
    """Returns a prediction of the discounted return at each step, fitted to these trajectories.

    The features are those of Duan et al. 2016 (arXiv 1604.06778): the observation, its square, the
    time t / 100, its square and cube, and a constant. The ridge is relative to the number of steps, so
    that the normal equations can be solved in float32, and features are scaled to the same size.

    Args:
        trajectories: those of one task.
        discount: in 0..1.

    Returns:
        `[num_trajectories, horizon]`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxmaml import rl
        >>> ones = jnp.ones((2, 3))
        >>> values = linear_baseline(rl.Trajectories(jnp.zeros((2, 3, 1)), ones, ones, ones, ones), 1.0)
        >>> values.round(1).tolist()
        [[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]
    """
    features = _features(trajectories)
    targets = discounted_returns(trajectories.rewards, discount)

    # Ridge regression. Steps after the end have no weight.
    weighted = (features * trajectories.mask[..., None]).reshape(-1, features.shape[-1])
    rows = features.reshape(weighted.shape)
    ridge = REGULARIZATION * jnp.maximum(trajectories.mask.sum(), 1)
    matrix = weighted.T @ rows + ridge * jnp.eye(rows.shape[1], dtype=rows.dtype)
    weights = jnp.linalg.solve(matrix, weighted.T @ targets.reshape(-1))
    return features @ weights * trajectories.mask


def advantages(
    trajectories: Trajectories,
    values: Array,
    *,
    discount: Scalar = 0.99,
    gae_lambda: Scalar = 1.0,
    normalize: bool = True,
) -> Array:
    """Returns generalized advantage estimates: Schulman et al. 2016 (arXiv 1506.02438), equation 16.

    Args:
        trajectories: those of one task.
        values: the baseline at each step, `[num_trajectories, horizon]`. After the last step of an
            episode, and after the horizon, it counts as zero.
        discount: in 0..1.
        gae_lambda: in 0..1. With 1 they are the discounted returns minus the baseline.
        normalize: divide by the standard deviation over all steps, after the mean is taken off.

    Returns:
        `[num_trajectories, horizon]`, zero after the end.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmaml import rl
        >>> ones = jnp.ones((1, 3))
        >>> found = rl.Trajectories(jnp.zeros((1, 3, 1)), ones, ones, ones, ones)
        >>> advantages(found, jnp.zeros((1, 3)), discount=1.0, normalize=False).tolist()
        [[3.0, 2.0, 1.0]]
    """
    mask, values = trajectories.mask, values * trajectories.mask
    after = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    errors = (trajectories.rewards + discount * after - values) * mask
    factor = jnp.asarray(discount * gae_lambda, errors.dtype)
    found = _backward_sum(errors, factor) * mask
    return normalized(found, values, mask)[0] if normalize else found


def normalized(found: Array, values: Array, mask: Array) -> tuple[Array, Array]:
    """Returns advantages with mean 0 and standard deviation 1, and what they were divided by, `[]`.

    Args:
        found: advantages, zero after the end.
        values: the baseline. Advantages and baseline give the size of the returns.
        mask: 1 for the steps that count. All are `[num_trajectories, horizon]`.

    Example:
        >>> import jax.numpy as jnp
        >>> zeros, ones = jnp.zeros((1, 2)), jnp.ones((1, 2))
        >>> found, scale = normalized(jnp.array([[1.0, 5.0]]), zeros, ones)
        >>> found.round(2).tolist(), round(float(scale), 2)
        ([[-1.0, 1.0]], 2.0)
    """
    mean = masked_mean(found, mask)
    deviation = jnp.sqrt(masked_mean(jnp.square(found - mean), mask))
    # Where all returns are equal, only rounding errors are left, which must not become a direction.
    size = jnp.sqrt(masked_mean(jnp.square(found + values), mask))
    scale = deviation + ROUNDING * size + 1e-8
    return (found - mean) * mask / scale, scale


def masked_mean(values: Array, mask: Array) -> Array:
    """Returns the mean over the steps that count, or 0 if none does.

    Raises:
        ValueError: a value and a mask are not given for the same steps. Those of a distribution whose
            `log_prob`, `kl` or `entropy` keeps the axis of the actions could still be multiplied.

    Example:
        >>> import jax.numpy as jnp
        >>> float(masked_mean(jnp.array([1.0, 3.0, 9.0]), jnp.array([1.0, 1.0, 0.0])))
        2.0
    """
    if values.shape != mask.shape:
        raise ValueError(
            f"a step has one number, as in the mask {list(mask.shape)}; got {list(values.shape)} "
            "(log_prob, kl and entropy of a distribution sum over the axis of the actions)"
        )
    return (values * mask).sum() / jnp.maximum(mask.sum(), 1)


def _backward_sum(values: Array, factor: Array) -> Array:
    """x_t + factor x_{t+1} + factor² x_{t+2} + ... along the last axis."""

    def add(total: Array, value: Array) -> tuple[Array, Array]:
        total = value + factor * total
        return total, total

    by_step = jnp.moveaxis(values, -1, 0)
    _, sums = jax.lax.scan(add, jnp.zeros_like(by_step[0]), by_step, reverse=True)
    return jnp.moveaxis(sums, 0, -1)


def _features(trajectories: Trajectories) -> Array:
    """`[num_trajectories, horizon, 2 observation_size + 4]`, each scaled to a mean square of 1."""
    # In a narrow type the time would wrap around, and the square of an observation.
    observations, mask = trees.in_float32(trajectories.observations), trajectories.mask
    num_trajectories, horizon, _ = observations.shape
    seen = jnp.clip(observations, -10, 10)
    time = jnp.arange(horizon, dtype=observations.dtype)[:, None] / 100
    powers = jnp.concatenate([time, time**2, time**3, jnp.ones_like(time)], axis=1)
    powers = jnp.broadcast_to(powers, (num_trajectories, *powers.shape))
    features = jnp.concatenate([seen, seen**2, powers], axis=2)
    # The ridge would otherwise shrink the weights of small features, as the time of a short episode.
    sizes = jnp.sqrt(jax.vmap(masked_mean, (2, None))(jnp.square(features), mask))
    return features / jnp.where(sizes > 0, sizes, 1)
