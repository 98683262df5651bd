"""UNICORN-MAML: Ye and Chao 2022 (arXiv 2106.16245), section 5."""

from typing import Any

import jax.numpy as jnp
import optax

from jaxmaml.learners import heads
from jaxmaml.learners.inner_loop import Start, inner_loop, learned
from jaxmaml.types import Extended, LossFn, MetaLearner


def unicorn(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    *,
    head: str = "head",
    way: int | None = None,
    **options: Any,
) -> MetaLearner:
    """MAML whose head starts with one meta-learned vector, the same for every class.

    The result does not depend on how the classes of a task are numbered, and any number of ways will
    do. Meta-parameters: `Extended(params, {"head": {"kernel": [num_features], "bias": []}})`, which
    start as the mean over the head's classes; the head in `params` is not used.

    Args:
        loss_fn, optimizer, num_inner_steps: as in `jaxmaml.maml`.
        head: path of the head, a mapping with "kernel" and perhaps "bias".
        way: number of classes, where it is not that of the head.
        options: keyword arguments of `jaxmaml.maml`.

    Raises:
        ValueError: when called, if `head` is no linear layer, or for another learner's parameters.
    """

    def init(params):
        return Extended(
            params, {"head": {name: x.mean(-1) for name, x in heads.get(params, head).items()}}
        )

    def start(meta_params, support, state):
        del support
        params, shared = learned(meta_params, "head")
        number = heads.way_of(params, head, way)
        copies = {name: jnp.stack([x] * number, axis=-1) for name, x in shared.items()}
        filled = heads.fill(params, head, copies["kernel"], copies.get("bias"))
        return Start(filled, optimizer, state)

    return inner_loop(loss_fn, start, num_inner_steps, init=init, **options)
