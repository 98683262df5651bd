"""Surrogates of the inner loop: one policy gradient, and three estimates of its derivative."""

from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jaxmaml.checks import check_choice
from jaxmaml.rl.baselines import masked_mean
from jaxmaml.types import Array

Inner: TypeAlias = Literal["reinforce", "lvc", "dice"]
"""The names of the surrogates; see `surrogate`."""


def surrogate(
    name: Inner, log_probs: Array, sampled_log_probs: Array, advantages: Array, mask: Array
) -> Array:
    """Returns an estimate whose gradient by the policy is the policy gradient.

    Let l_t be the log-likelihood of action t, S_t the sum of the gradients of l up to step t, and A_t
    the advantage. At the policy that sampled, the three have the same gradient, the mean of A_t grad l_t
    over the steps. Their values differ, and mean nothing. Their Hessians are means over the steps of

    | name | Hessian |
    |---|---|
    | "reinforce" | A_t hess l_t |
    | "lvc" | A_t (hess l_t + grad l_t grad l_t^T) |
    | "dice" | A_t (hess l_t + grad l_t grad l_t^T + S_{t-1} grad l_t^T + grad l_t S_{t-1}^T) |

    The exact meta-gradient contains the Hessian of the inner loop's surrogate.

    - "reinforce": Williams 1992, as in the MAML paper. Trajectories are constants. This is the Hessian
      of the policy gradient as it was estimated, and what the sampled procedure differentiates once
      its trajectories are given: with `rl.with_sampling_correction` the meta-gradient is unbiased. By
      itself it leaves out all that the policy decides about what is sampled.
    - "dice": Foerster et al. 2018 (arXiv 1802.05098), in the form for advantages of Farquhar et al.
      2019 (arXiv 1909.10549). Its expectation is the Hessian of the expected return. The
      bias of the meta-gradient is of second order in the inner rate, where that of the other two is of
      first order: the effect of what is sampled on the adapted policy counts by its linear part. The
      variance is the largest of the three.
    - "lvc", low variance curvature: Rothfuss et al. 2019 (arXiv 1810.06784). It leaves out
      S_{t-1}: in expectation, the sum over steps of grad l_t (grad Q_t)^T and its transpose, where Q_t
      is the expected return after action t. With a horizon of 1 it is "dice".

    These expectations hold for advantages without bias: a discount of 1, a lambda of 1 and a baseline
    that depends on the state and the time only. Without a baseline, "dice" is then the objective of
    Foerster et al. up to a constant: the magic box of all actions up to a step times its reward. The
    baseline of step t has the box of the actions up to t minus that of the actions before t, which
    lowers the variance of both derivatives and makes the first one that of "reinforce". With a lambda
    below 1, the advantages rest on the baseline's predictions, and both derivatives have their bias.
    With a discount, a step counts discount^-t times as much as in the paper, as is usual in policy
    gradients: the three still agree, but no longer estimate the derivatives of one expected return.

    "lvc" divides by the likelihood under the policy that sampled. At other parameters than those that
    sampled, such as in the later epochs of `rl.promp`, its gradient has this importance weight for each
    step, and that of the other two has none.

    Args:
        name: "reinforce", "lvc" or "dice".
        log_probs: the log-likelihood of each action, differentiated.
        sampled_log_probs: the same under the policy that sampled, constant.
        advantages: see `rl.advantages`.
        mask: 1 for the steps that count. All are `[num_trajectories, horizon]`.

    Returns:
        The mean over the steps that count, `[]`.

    Raises:
        ValueError: `name` is unknown.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> ones, advantages = jnp.ones((1, 2)), jnp.array([[3.0, 1.0]])
        >>> log_probs = lambda x: jnp.log(jax.nn.sigmoid(x)) * ones
        >>> def hessian(name):
        ...     fn = lambda x: surrogate(name, log_probs(x), log_probs(0.0), advantages, ones)
        ...     return float(jax.hessian(fn)(0.0))
        >>> [hessian(name) for name in ("reinforce", "lvc", "dice")]
        [-0.5, 0.0, 0.25]
    """
    check_choice("name", name, get_args(Inner))
    if name == "reinforce":
        weights = log_probs
    elif name == "lvc":
        weights = jnp.exp(log_probs - sampled_log_probs)
    else:
        weights = _boxes(log_probs * mask)
    return masked_mean(weights * advantages, mask)


def _boxes(log_probs: Array) -> Array:
    """The magic box of the actions up to each step, minus that of the actions before it: 0 in value."""
    up_to = jnp.cumsum(log_probs, axis=1)
    return _box(up_to) - _box(up_to - log_probs)


def _box(log_prob: Array) -> Array:
    """1, whose derivatives of all orders are those of a likelihood relative to itself."""
    return jnp.exp(log_prob - jax.lax.stop_gradient(log_prob))
