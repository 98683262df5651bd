"""Model-agnostic meta-learning: Finn, Abbeel and Levine 2017 (arXiv 1703.03400), algorithm 1."""

import optax

from jaxmaml import inner
from jaxmaml.mixed_mode import check_adjoint, check_scalar
from jaxmaml.types import AtStep, Info, LossFn, Mask, MetaLearner


def maml(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    *,
    outer_loss_fn: LossFn | None = None,
    order: str = "exact",
    adjoint: str = "forward_over_reverse",
    checkpoint_every: int | None = None,
    mask: Mask = None,
    at_step: AtStep = inner.fold_keys,
    has_state: bool = False,
) -> MetaLearner:
    """MAML with exact or first-order (FOMAML) meta-gradients, over any loss and any inner optimiser.

    The meta-loss of one task is the query loss of the parameters adapted on its support (equation 2
    of the paper); its meta-parameters are the initial parameters.

    Args:
        loss_fn: `(params, batch) -> scalar mean loss`; with has_state `(params, batch, state) ->
            (loss, state)`.
        optimizer: the inner optimiser, any optax transformation. The paper's sum-over-examples
            losses divide by K, so its inner rate is to be multiplied by the way for a mean loss.
        num_inner_steps: inner steps in training; `adapt` and `trace` take another number.
        outer_loss_fn: scores the query where that is not `loss_fn`; takes what `loss_fn` takes.
        order: "exact", or "first" which treats the inner gradients as constants.
        adjoint: how an exact gradient is computed: "forward_over_reverse" (memory of first order),
            "checkpoint" or "reverse"; see `jaxmaml.adapt`.
        checkpoint_every: saves memory over hundreds of inner steps; see `jaxmaml.adapt`.
        mask: what the inner loop adapts, a pytree of bools or a function of a leaf's path; the rest
            is outer-learned only.
        at_step: see `jaxmaml.adapt`.
        has_state: whether the losses carry state.

    Raises:
        ValueError: an unknown order or adjoint, a negative number of steps, a mask matching nothing.
        TypeError: a loss that is no floating-point scalar.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2) / 2
        >>> learner = jaxmaml.maml(loss_fn, optax.sgd(0.5), 1)
        >>> task = jaxmaml.Task(support=jnp.ones(4), query=jnp.ones(4))
        >>> grad, info = jax.grad(learner.loss, has_aux=True)(jnp.array(0.0), task)
        >>> float(grad), float(info.query_loss)
        (-0.25, 0.125)
    """
    inner.check_order(order)
    check_adjoint(adjoint)
    inner.check_checkpoint_every(checkpoint_every)
    default = inner.check_num_inner_steps(num_inner_steps)
    score = loss_fn if outer_loss_fn is None else outer_loss_fn
    options = {
        "order": order, "adjoint": adjoint, "checkpoint_every": checkpoint_every, "mask": mask,
        "at_step": at_step, "has_state": has_state,
    }  # fmt: skip

    def adapt(params, support, *, state=(), num_inner_steps=None):
        number = default if num_inner_steps is None else num_inner_steps
        return inner.adapt(loss_fn, params, support, optimizer, number, state=state, **options)

    def trace(params, support, view, *, state=(), num_inner_steps=None):
        number = default if num_inner_steps is None else num_inner_steps
        return inner.trace(
            loss_fn, params, support, view, optimizer, number, state=state, **options
        )

    def loss(params, task, *, step=0, state=()):
        del step
        adapted, info = adapt(params, task.support, state=state)
        out = score(adapted, task.query, *((info.state,) if has_state else ()))
        query_loss, state = out if has_state else (out, info.state)
        check_scalar(query_loss)
        return query_loss, Info(query_loss, info.inner_losses, state)

    return MetaLearner(init=lambda params: params, adapt=adapt, trace=trace, loss=loss)
