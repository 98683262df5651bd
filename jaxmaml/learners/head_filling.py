"""What the learners share that compute a head from the support, in one go and without a loop."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmaml.learners.inner_loop import bare
from jaxmaml.mixed_mode import check_scalar
from jaxmaml.types import Batch, Info, LossFn, MetaLearner, MetaParams, Params


def head_filling(
    loss_fn: LossFn,
    fill: Callable[[MetaParams, Batch], Params],
    *,
    init: Callable[[Params], MetaParams] = lambda params: params,
) -> MetaLearner:
    """A meta-learner that adapts by `fill`: no inner steps, no second derivatives.

    Args:
        loss_fn: `(params, batch) -> scalar mean loss`, which scores the query.
        fill: `(meta_params, support) -> params` with the head filled in; differentiated.
        init: `(params) -> meta_params`.
    """

    def adapt(meta_params, support, *, state=(), num_inner_steps=None):
        _check_steps(num_inner_steps)
        return fill(meta_params, support), Info(None, jnp.zeros(0), state)

    def trace(meta_params, support, view, *, state=(), num_inner_steps=None):
        _check_steps(num_inner_steps)
        seen = view(fill(meta_params, support))
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], seen)

    def loss(meta_params, task, *, step=0, state=()):
        del step
        query_loss = loss_fn(fill(meta_params, task.support), task.query)
        check_scalar(query_loss)
        return query_loss, Info(query_loss, jnp.zeros(0), state)

    return MetaLearner(init=init, adapt=adapt, trace=trace, loss=loss)


def bare_fill(
    fill: Callable[[Params, Batch], Params],
) -> Callable[[MetaParams, Batch], Params]:
    """`fill` of a learner whose meta-parameters are the parameters."""
    return lambda meta_params, support: fill(bare(meta_params), support)


def _check_steps(num_inner_steps: Any) -> None:
    if num_inner_steps:
        raise ValueError(
            f"this learner fills in its head at once and has no inner steps; got {num_inner_steps}"
        )
