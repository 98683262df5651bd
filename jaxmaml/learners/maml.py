"""Model-agnostic meta-learning: Finn, Abbeel and Levine 2017 (arXiv 1703.03400), algorithm 1."""

from typing import Any

from jaxmaml import inner
from jaxmaml.adjoints import Adjoint, FirstOrder
from jaxmaml.learners.hyperparams import Optimizer
from jaxmaml.learners.inner_loop import LoopOptions, inner_loop
from jaxmaml.schedules import QueryWeights
from jaxmaml.types import AtStep, LossFn, Mask, MetaLearner


def maml(
    loss_fn: LossFn,
    optimizer: Optimizer,
    num_inner_steps: int,
    *,
    adjoint: Adjoint = inner.EXACT,
    mask: Mask = None,
    query_loss_fn: LossFn | None = None,
    test_loss_fn: LossFn | None = None,
    query_weights: QueryWeights | None = None,
    refresh_state: bool = False,
    at_step: AtStep = inner.fold_keys,
) -> MetaLearner:
    """Returns MAML, over any loss and any inner optimizer.

    The meta-loss of one task is the query loss of the parameters that are adapted on its support
    (equation 2 of the paper). The meta-parameters are the initial parameters; with a
    `LearnedOptimizer` they are `Extended(params, {"hyperparams": ...})`.

    Args:
        loss_fn: `(params, batch) -> scalar mean loss`, or a loss that `jaxmaml.with_state` marks.
        optimizer: the inner optimizer: any optax transformation, or a `LearnedOptimizer`. The
            paper's code divides a sum over all support examples by the number per class, so that its
            inner rates must be multiplied by the way for a mean loss.
        num_inner_steps: the inner steps in training, 0 or more; `adapt` and `trace` take another
            number.
        adjoint: how the meta-gradient is computed: `Exact()`, `FirstOrder()`, `Annealed(...)`, ...
        mask: what the inner loop adapts: a pytree of bools, or a function of a leaf's path. The outer
            loop learns everything.
        query_loss_fn: the loss on the query. Defaults to `loss_fn`.
        test_loss_fn: what `adapt` and `trace` adapt on, such as a model that normalizes with stored
            statistics once it is trained. Defaults to `loss_fn`.
        query_weights: the weights of the query losses after each inner step, `[num_inner_steps]`, or
            a schedule `outer_step -> weights` such as `multi_step_weights`. The query passes are
            recomputed in the backward pass, so that the memory does not grow with their number. None
            scores after the last step.
        refresh_state: compute the state once more, on the support with the adapted parameters, before
            the query is scored, and differentiate through it. Inductive normalization needs this:
            the statistics of the last inner step belong to the parameters before that step.
        at_step: see `jaxmaml.adapt`.

    Raises:
        ValueError: a negative number of steps, weights of another shape, `refresh_state` for a loss
            without state; when called, a mask that matches nothing.
        TypeError: when called, a loss that is not a floating-point scalar.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2) / 2
        >>> learner = jaxmaml.maml(loss_fn, optax.sgd(0.5), 1)
        >>> task = jaxmaml.Task(support=jnp.ones(4), query=jnp.ones(4))
        >>> grad, info = jax.grad(learner.loss, has_aux=True)(jnp.array(0.0), task)
        >>> float(grad), float(info.query_loss)
        (-0.25, 0.125)

        The multi-step loss of MAML++, over an inner Adam:

        >>> learner = jaxmaml.maml(
        ...     loss_fn,
        ...     optax.adam(1e-2),
        ...     5,
        ...     query_weights=jaxmaml.multi_step_weights(5, 10_000),
        ... )
    """
    options = LoopOptions(
        adjoint=adjoint,
        mask=mask,
        query_loss_fn=query_loss_fn,
        test_loss_fn=test_loss_fn,
        query_weights=query_weights,
        refresh_state=refresh_state,
        at_step=at_step,
    )
    return inner_loop(loss_fn, optimizer, num_inner_steps, options)


def fomaml(
    loss_fn: LossFn, optimizer: Optimizer, num_inner_steps: int, **options: Any
) -> MetaLearner:
    """Returns first-order MAML: `maml` with the inner gradients as constants (section 5.2).

    Args:
        loss_fn, optimizer, num_inner_steps: as in `jaxmaml.maml`.
        options: keyword arguments of `jaxmaml.maml` other than `adjoint`.

    Raises:
        TypeError: an `adjoint` is given.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2) / 2
        >>> learner = jaxmaml.fomaml(loss_fn, optax.sgd(0.5), 1)
        >>> task = jaxmaml.Task(support=jnp.ones(4), query=jnp.ones(4))
        >>> float(jax.grad(learner.loss, has_aux=True)(jnp.array(0.0), task)[0])
        -0.5
    """
    if "adjoint" in options:
        raise TypeError("fomaml is first order by definition: use jaxmaml.maml(adjoint=...)")
    return maml(loss_fn, optimizer, num_inner_steps, adjoint=FirstOrder(), **options)
