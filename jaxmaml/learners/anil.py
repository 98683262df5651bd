"""Almost no inner loop: Raghu et al. 2020 (arXiv 1909.09157), section 5."""

from typing import Any

from jaxmaml.learners.hyperparams import Optimizer
from jaxmaml.learners.masked import masked_inner_loop
from jaxmaml.trees import under_path
from jaxmaml.types import LossFn, MetaLearner


def anil(
    loss_fn: LossFn,
    optimizer: Optimizer,
    num_inner_steps: int,
    *,
    head: str = "head",
    **options: Any,
) -> MetaLearner:
    """Returns MAML whose inner loop adapts the head only; the outer loop learns everything.

    Args:
        loss_fn, optimizer, num_inner_steps: as in `jaxmaml.maml`.
        head: path of the head in the parameters, such as "head" or "decoder/out".
        options: keyword arguments of `jaxmaml.maml` other than `mask`.

    Raises:
        TypeError: a mask is given.
        ValueError: when called, if no parameter lies at `head`, or all of them do.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxmaml
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((params["body"] * params["head"] * batch - 1.0) ** 2)
        >>> learner = jaxmaml.anil(loss_fn, optax.sgd(0.1), 1)
        >>> params = {"body": jnp.array(2.0), "head": jnp.array(0.0)}
        >>> adapted, info = learner.adapt(params, jnp.ones(3))
        >>> round(float(adapted["body"]), 3), round(float(adapted["head"]), 3)
        (2.0, 0.4)
    """
    return masked_inner_loop(
        loss_fn,
        optimizer,
        num_inner_steps,
        options,
        learner="anil",
        path=head,
        mask=under_path(head),
    )
