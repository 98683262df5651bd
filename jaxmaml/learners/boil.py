"""Body-only update in the inner loop: Oh et al. 2021 (arXiv 2008.08882)."""

from typing import Any

from jaxmaml.learners.hyperparams import Optimizer
from jaxmaml.learners.masked import masked_inner_loop
from jaxmaml.trees import beside_path
from jaxmaml.types import LossFn, MetaLearner


def boil(
    loss_fn: LossFn,
    optimizer: Optimizer,
    num_inner_steps: int,
    *,
    head: str = "head",
    **options: Any,
) -> MetaLearner:
    """Returns MAML whose inner loop adapts everything but the head.

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
        >>> learner = jaxmaml.boil(loss_fn, optax.sgd(0.1), 1)
        >>> params = {"body": jnp.array(0.0), "head": jnp.array(2.0)}
        >>> adapted, info = learner.adapt(params, jnp.ones(3))
        >>> round(float(adapted["body"]), 3), round(float(adapted["head"]), 3)
        (0.4, 2.0)
    """
    return masked_inner_loop(
        loss_fn,
        optimizer,
        num_inner_steps,
        options,
        learner="boil",
        path=head,
        mask=beside_path(head),
    )
