"""Meta-SGD: Li, Zhou, Chen and Li 2017 (arXiv 1707.09835)."""

from typing import Any

from jaxmaml.learners.learned_optimizer import (
    check_granularity,
    learned_optimizer,
    rates,
    scale_by_rates,
)
from jaxmaml.types import LossFn, MetaLearner


def meta_sgd(
    loss_fn: LossFn,
    num_inner_steps: int,
    *,
    inner_lr: float = 0.1,
    granularity: str = "parameter",
    per_step: bool = False,
    **options: Any,
) -> MetaLearner:
    """MAML that meta-learns the inner learning rates: theta' = theta - rates * gradient.

    Equation 1 of the paper. Meta-parameters: `Extended(params, {"hyperparams": rates})`. A rate may
    become negative.

    Args:
        loss_fn: as in `jaxmaml.maml`.
        num_inner_steps: inner steps in training; the paper makes one.
        inner_lr: the initial value of all rates (the paper draws it from [0.005, 0.1]).
        granularity: "parameter" (the paper), "layer" (one rate for each array of the parameters) or
            "scalar".
        per_step: each inner step has rates of its own; the last ones serve again where more steps
            are made at test time. With "layer" this is MAML++'s learned rates.
        options: keyword arguments of `jaxmaml.maml`.

    Raises:
        ValueError: an unknown granularity, `per_step` without inner steps; when called, for another
            learner's parameters.

    Example:
        >>> import jax, jax.numpy as jnp, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2) / 2
        >>> learner = jaxmaml.meta_sgd(loss_fn, 1, inner_lr=0.5)
        >>> adapted, _ = learner.adapt(learner.init(jnp.array([0.0, 2.0])), jnp.ones((4, 1)))
        >>> adapted.tolist()
        [0.25, 1.75]
    """
    check_granularity(granularity)
    first = lambda params: rates(params, inner_lr, granularity)
    return learned_optimizer(
        loss_fn, scale_by_rates, first, num_inner_steps, per_step=per_step, **options
    )
