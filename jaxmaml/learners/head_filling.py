"""The learners that compute a head from the support at once, without an inner loop."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmaml.learners.inner_loop import split_learned
from jaxmaml.mixed_mode import check_scalar
from jaxmaml.types import (
    Array,
    Batch,
    Extended,
    Info,
    LossFn,
    MetaLearner,
    MetaParams,
    Params,
    Scalar,
    State,
    Task,
    View,
    as_stateful,
    carries_state,
)


def head_filling(
    loss_fn: LossFn,
    fill: Callable[[Params, Mapping[str, Any], Batch], Params],
    *,
    init_learned: Mapping[str, Callable[[Params], Any]] | None = None,
) -> MetaLearner:
    """Returns a learner that adapts by `fill`: no inner steps, no second derivatives.

    Args:
        loss_fn: `(params, batch) -> scalar mean loss`, which scores the query.
        fill: `(params, learned, support) -> params` with the head filled in; differentiated.
        init_learned: see `inner_loop`.

    Raises:
        ValueError: the loss carries state.
    """
    if carries_state(loss_fn):
        raise ValueError(
            "a learner that fills in its head computes features without state: pass a loss whose "
            "model carries none, such as one with norm='transductive' or 'layer'"
        )
    inits = init_learned or {}

    def init(params: Params) -> MetaParams:
        learned = {name: init(params) for name, init in inits.items()}
        return Extended(params, learned) if learned else params

    def filled(meta_params: MetaParams, support: Batch) -> Params:
        params, learned = split_learned(meta_params, tuple(inits))
        return fill(params, learned, support)

    return MetaLearner(
        init=init,
        adapt=functools.partial(_adapt, filled),
        trace=functools.partial(_trace, filled),
        loss=functools.partial(_loss, loss_fn, filled),
    )


Filled = Callable[[MetaParams, Batch], Params]


def _adapt(
    filled: Filled,
    meta_params: MetaParams,
    support: Batch,
    *,
    state: State = (),
    num_inner_steps: int | None = None,
) -> tuple[Params, Info]:
    _check_steps(num_inner_steps)
    return filled(meta_params, support), Info(None, jnp.zeros(0), state)


def _trace(
    filled: Filled,
    meta_params: MetaParams,
    support: Batch,
    view: View,
    *,
    state: State = (),
    num_inner_steps: int | None = None,
) -> Any:
    _check_steps(num_inner_steps)
    seen = view(filled(meta_params, support), state)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], seen)


def _loss(
    loss_fn: LossFn,
    filled: Filled,
    meta_params: MetaParams,
    task: Task,
    *,
    step: Scalar = 0,
    state: State = (),
) -> tuple[Array, Info]:
    del step
    query_loss, _ = as_stateful(loss_fn)(filled(meta_params, task.support), task.query, state)
    check_scalar(query_loss)
    return query_loss, Info(query_loss, jnp.zeros(0), state)


def _check_steps(num_inner_steps: int | None) -> None:
    if num_inner_steps:
        raise ValueError(
            "this learner fills in its head at once and has no inner steps; "
            f"got num_inner_steps={num_inner_steps}"
        )
