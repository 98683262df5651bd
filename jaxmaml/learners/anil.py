"""Almost no inner loop: Raghu et al. 2020 (arXiv 1909.09157), section 5."""

from typing import Any

import optax

from jaxmaml.learners.heads import check_path, under_path
from jaxmaml.learners.inner_loop import Start, bare, inner_loop
from jaxmaml.types import LossFn, MetaLearner


def anil(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    *,
    head: str = "head",
    **options: Any,
) -> MetaLearner:
    """MAML whose inner loop adapts the head only; the body is outer-learned.

    Args:
        loss_fn, optimizer, num_inner_steps: as in `jaxmaml.maml`.
        head: path of the head in the parameters, such as "head" or "decoder/out".
        options: keyword arguments of `jaxmaml.maml` other than `mask`.

    Raises:
        ValueError: when called, if nothing lies at `head`, or nothing beside it.

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

    def start(meta_params, support, state):
        del support
        check_path(bare(meta_params), head)
        return Start(meta_params, optimizer, state)

    return inner_loop(loss_fn, start, num_inner_steps, mask=under_path(head), **options)
