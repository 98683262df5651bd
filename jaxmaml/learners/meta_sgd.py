"""Meta-SGD: Li, Zhou, Chen and Li 2017 (arXiv 1707.09835)."""

from typing import Any

from jaxmaml.learners.hyperparams import Granularity, learned_sgd
from jaxmaml.learners.maml import maml
from jaxmaml.types import LossFn, MetaLearner


def meta_sgd(
    loss_fn: LossFn,
    num_inner_steps: int,
    *,
    inner_lr: float = 0.1,
    granularity: Granularity = "parameter",
    per_step: bool = False,
    **options: Any,
) -> MetaLearner:
    """Returns MAML that learns the inner learning rates: theta' = theta - rates * gradient.

    Equation 1 of the paper. It is `jaxmaml.maml` with `jaxmaml.learned_sgd`: the meta-parameters are
    `Extended(params, {"hyperparams": rates})`, and `jaxmaml.learned_rates` reads the rates back.

    Args:
        loss_fn: as in `jaxmaml.maml`.
        num_inner_steps: inner steps in training; the paper makes one.
        inner_lr: the initial value of all rates; the paper draws it from [0.005, 0.1]. A rate may
            become negative.
        granularity: "parameter" (the paper), "layer" (one rate per array of the parameters) or
            "scalar".
        per_step: whether each inner step has its own rates. Steps beyond `num_inner_steps` use the
            last ones. With "layer" these are the learned rates of MAML++.
        options: keyword arguments of `jaxmaml.maml`. Parameters that `mask` leaves out have no rate.

    Raises:
        ValueError: an unknown granularity, or `per_step` without inner steps; when called, for the
            meta-parameters of another learner.

    Example:
        >>> import jax, jax.numpy as jnp, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2) / 2
        >>> learner = jaxmaml.meta_sgd(loss_fn, 1, inner_lr=0.5)
        >>> adapted, _ = learner.adapt(learner.init(jnp.array([0.0, 2.0])), jnp.ones((4, 1)))
        >>> adapted.tolist()
        [0.25, 1.75]
    """
    if per_step and num_inner_steps == 0:
        raise ValueError("per_step=True needs at least one inner step; got num_inner_steps=0")
    num_steps = num_inner_steps if per_step else None
    optimizer = learned_sgd(inner_lr, granularity=granularity, num_steps=num_steps)
    return maml(loss_fn, optimizer, num_inner_steps, **options)
