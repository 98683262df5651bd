"""Body only update in inner loop: Oh et al. 2021 (arXiv 2008.08882)."""

from typing import Any

import optax

from jaxmaml.learners.heads import beside_path, check_path
from jaxmaml.learners.inner_loop import Start, bare, inner_loop
from jaxmaml.types import LossFn, MetaLearner


def boil(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    *,
    head: str = "head",
    **options: Any,
) -> MetaLearner:
    """MAML whose inner loop adapts all but the head; the head is outer-learned.

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
        >>> learner = jaxmaml.boil(loss_fn, optax.sgd(0.1), 1)
        >>> params = {"body": jnp.array(0.0), "head": jnp.array(2.0)}
        >>> adapted, info = learner.adapt(params, jnp.ones(3))
        >>> round(float(adapted["body"]), 3), round(float(adapted["head"]), 3)
        (0.4, 2.0)
    """

    def start(meta_params, support, state):
        del support
        check_path(bare(meta_params), head)
        return Start(meta_params, optimizer, state)

    return inner_loop(loss_fn, start, num_inner_steps, mask=beside_path(head), **options)
