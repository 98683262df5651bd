"""What every learner with an inner loop is made of; each algorithm says what the loop starts from."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmaml import inner
from jaxmaml.mixed_mode import check_adjoint, check_scalar
from jaxmaml.types import (
    AtStep,
    Batch,
    Extended,
    Info,
    LossFn,
    Mask,
    MetaLearner,
    MetaParams,
    Params,
    State,
)


class Start(NamedTuple):
    """What the inner loop of one task starts from.

    Attributes:
        params: the parameters before the first step.
        optimizer: the inner optimiser, which may hold meta-parameters.
        state: what the loss function carries.
    """

    params: Params
    optimizer: optax.GradientTransformation
    state: State


StartFn = Callable[[MetaParams, Batch, State], Start]
"""(meta_params, support, state) -> Start; what it computes is differentiated."""


def inner_loop(
    loss_fn: LossFn,
    start: StartFn,
    num_inner_steps: int,
    *,
    init: Callable[[Params], MetaParams] = lambda params: params,
    outer_loss_fn: LossFn | None = None,
    test_loss_fn: LossFn | None = None,
    order: str = "exact",
    num_exact_steps: int | None = None,
    exact_from: int = 0,
    multi_step_loss: int = 0,
    adjoint: str = "forward_over_reverse",
    checkpoint_every: int | None = None,
    mask: Mask = None,
    at_step: AtStep = inner.fold_keys,
    has_state: bool = False,
    refresh_state: bool = False,
) -> MetaLearner:
    """A meta-learner that adapts by gradient steps from `start`, and scores on the query.

    Args:
        loss_fn: as in `jaxmaml.maml`.
        start: what the loop starts from; MAML's is the meta-parameters themselves.
        num_inner_steps: as in `jaxmaml.maml`.
        init: `(params) -> meta_params`.
        outer_loss_fn, test_loss_fn, order, num_exact_steps, exact_from, multi_step_loss, adjoint,
            checkpoint_every, mask, at_step, has_state, refresh_state: see `jaxmaml.maml`.
    """
    default = inner.check_num_inner_steps(num_inner_steps)
    check_adjoint(adjoint)
    inner.check_checkpoint_every(checkpoint_every)
    _check_orders(order, num_exact_steps, exact_from)
    _check_multi_step_loss(multi_step_loss, default)
    _check_state_options(has_state, refresh_state)
    score = loss_fn if outer_loss_fn is None else outer_loss_fn
    at_test = loss_fn if test_loss_fn is None else test_loss_fn
    options: dict[str, Any] = {
        "num_exact_steps": num_exact_steps, "adjoint": adjoint, "mask": mask,
        "checkpoint_every": checkpoint_every, "at_step": at_step, "has_state": has_state,
    }  # fmt: skip

    def refreshed(loss_fn, adapted, support, state):
        return loss_fn(adapted, support, state)[1] if refresh_state else state

    def adapt(meta_params, support, *, state=(), num_inner_steps=None):
        number = default if num_inner_steps is None else num_inner_steps
        params, optimizer, state = start(meta_params, support, state)
        adapted, info = inner.adapt(
            at_test, params, support, optimizer, number, order=order, state=state, **options
        )
        return adapted, info._replace(state=refreshed(at_test, adapted, support, info.state))

    def trace(meta_params, support, view, *, state=(), num_inner_steps=None):
        number = default if num_inner_steps is None else num_inner_steps
        params, optimizer, state = start(meta_params, support, state)

        def seen(adapted, *state):
            fresh = (refreshed(at_test, adapted, support, *state),) if has_state else ()
            return view(adapted, *fresh)

        return inner.trace(
            at_test, params, support, seen, optimizer, number, order=order, state=state, **options
        )

    def query_loss_of(adapted, task, state):
        state = refreshed(loss_fn, adapted, task.support, state)
        out = score(adapted, task.query, *((state,) if has_state else ()))
        query_loss, state = out if has_state else (out, state)
        check_scalar(query_loss)
        return query_loss, state

    def loss_of_order(meta_params, task, step, state, order):
        params, optimizer, state = start(meta_params, task.support, state)
        if not multi_step_loss:
            adapted, info = inner.adapt(
                loss_fn, params, task.support, optimizer, default,
                order=order, state=state, **options,
            )  # fmt: skip
            query_loss, state = query_loss_of(adapted, task, info.state)
            return query_loss, Info(query_loss, info.inner_losses, state)

        # Without the checkpoint the query pass of every step would be kept until the backward pass.
        @jax.checkpoint
        def view(adapted, *state):
            return query_loss_of(adapted, task, *(state or ((),)))

        _, inner_losses, (query_losses, states) = inner.run(
            loss_fn, params, task.support, view, optimizer, default,
            order=order, state=state, **options,
        )  # fmt: skip
        weights = multi_step_weights(step, default, multi_step_loss).astype(query_losses.dtype)
        last = jax.tree.map(lambda leaf: leaf[-1], states)
        return weights @ query_losses, Info(query_losses[-1], inner_losses, last)

    def loss(meta_params, task, *, step=0, state=()):
        if order == "first" or not exact_from:
            return loss_of_order(meta_params, task, step, state, order)
        first = functools.partial(loss_of_order, order="first")
        exact = functools.partial(loss_of_order, order="exact")
        return jax.lax.cond(step < exact_from, first, exact, meta_params, task, step, state)

    return MetaLearner(init=init, adapt=adapt, trace=trace, loss=loss)


def multi_step_weights(step: Any, num_inner_steps: int, num_outer_steps: int) -> jax.Array:
    """The weight of each inner step's query loss, at an outer step.

    They start alike and move linearly to the last inner step, where they arrive after
    `num_outer_steps` but for 3 % of the initial weight, which the others keep (Antoniou et al. 2019,
    arXiv 1810.09502, section 4, and the authors' code).

    Returns:
        `[num_inner_steps]`, adding up to 1.

    Example:
        >>> multi_step_weights(0, 4, 100).tolist()
        [0.25, 0.25, 0.25, 0.25]
        >>> [round(float(w), 4) for w in multi_step_weights(100, 4, 100)]
        [0.0075, 0.0075, 0.0075, 0.9775]
    """
    progress = jnp.asarray(step) / num_outer_steps
    others = jnp.maximum(1 - progress, 0.03) / num_inner_steps
    weights = jnp.full(num_inner_steps, others)
    return weights.at[-1].set(1 - others * (num_inner_steps - 1))


def learned(meta_params: MetaParams, name: str) -> tuple[Params, Any]:
    """(params, what is learned under `name`) of a learner's own meta-parameters.

    Raises:
        ValueError: they are another learner's.
    """
    if not isinstance(meta_params, Extended):
        raise ValueError(
            f"these are bare parameters: a learner that learns {name!r} too is given what its own "
            "init(params) returns"
        )
    if set(meta_params.learned) != {name}:
        raise ValueError(
            f"these are another learner's meta-parameters: they hold {sorted(meta_params.learned)}, "
            f"and this learner learns {name!r}"
        )
    return meta_params.params, meta_params.learned[name]


def bare(meta_params: MetaParams) -> Params:
    """The meta-parameters of a learner that learns the initial parameters only.

    Raises:
        ValueError: they are another learner's.
    """
    if isinstance(meta_params, Extended):
        raise ValueError(
            "these are another learner's meta-parameters: beside the parameters they hold "
            f"{sorted(meta_params.learned)}, which this learner does not learn"
        )
    return meta_params


def _check_orders(order: str, num_exact_steps: int | None, exact_from: int) -> None:
    inner.check_order(order)
    inner.check_num_exact_steps(num_exact_steps)
    _check_outer_steps("exact_from", exact_from)
    if order == "first" and (num_exact_steps is not None or exact_from):
        raise ValueError(
            "num_exact_steps and exact_from say where the meta-gradient is exact, and with "
            "order='first' it is nowhere"
        )


def _check_multi_step_loss(multi_step_loss: int, num_inner_steps: int) -> None:
    _check_outer_steps("multi_step_loss", multi_step_loss)
    if multi_step_loss and not num_inner_steps:
        raise ValueError("multi_step_loss needs at least one inner step; got num_inner_steps=0")


def _check_outer_steps(name: str, number: int) -> None:
    is_int = isinstance(number, int) and not isinstance(number, bool)
    if not is_int or number < 0:
        raise ValueError(f"{name} must be a number of outer steps, 0 or more; got {number!r}")


def _check_state_options(has_state: bool, refresh_state: bool) -> None:
    if refresh_state and not has_state:
        raise ValueError("refresh_state needs has_state=True: without it there is no state")
