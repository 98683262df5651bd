"""Model-agnostic meta-learning: Finn, Abbeel and Levine 2017 (arXiv 1703.03400), algorithm 1."""

import optax

from jaxmaml import inner
from jaxmaml.learners.inner_loop import Start, bare, inner_loop
from jaxmaml.types import AtStep, LossFn, Mask, MetaLearner


def maml(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    *,
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
        test_loss_fn: what `adapt` and `trace` adapt on where that is not `loss_fn`, such as a model
            that normalises with running statistics once it is trained.
        order: "exact", or "first" which treats the inner gradients as constants.
        num_exact_steps: only the last so many inner steps are exact; None is all.
        exact_from: before this outer step the meta-gradient is first order (derivative-order
            annealing, Antoniou et al. 2019, arXiv 1810.09502); 0 is exact from the start.
        multi_step_loss: the query is scored after every inner step, with weights that move to the
            last one within so many outer steps (the same paper; `learners.multi_step_weights`). Each
            query pass is computed anew in the backward pass, so that memory does not grow with it. 0
            scores the last step only.
        adjoint: how an exact gradient is computed: "forward_over_reverse" (memory of first order),
            "checkpoint" or "reverse"; see `jaxmaml.adapt`.
        checkpoint_every: saves memory over hundreds of inner steps; see `jaxmaml.adapt`.
        mask: what the inner loop adapts, a pytree of bools or a function of a leaf's path; the rest
            is outer-learned only.
        at_step: see `jaxmaml.adapt`.
        has_state: whether the losses carry state.
        refresh_state: compute the state once more on the support with the adapted parameters before
            the query is scored, and differentiate through it. Inductive normalisation needs it: the
            last inner step's statistics are those of the parameters before it.

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
    return inner_loop(
        loss_fn,
        lambda meta_params, support, state: Start(bare(meta_params), optimizer, state),
        num_inner_steps,
        outer_loss_fn=outer_loss_fn,
        test_loss_fn=test_loss_fn,
        order=order,
        num_exact_steps=num_exact_steps,
        exact_from=exact_from,
        multi_step_loss=multi_step_loss,
        adjoint=adjoint,
        checkpoint_every=checkpoint_every,
        mask=mask,
        at_step=at_step,
        has_state=has_state,
        refresh_state=refresh_state,
    )
