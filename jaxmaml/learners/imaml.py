"""Implicit MAML: Rajeswaran, Finn, Kakade and Levine 2019 (arXiv 1909.04630)."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxmaml import inner
from jaxmaml.learners.inner_loop import bare
from jaxmaml.mixed_mode import check_scalar, merge_leaves, select_leaves
from jaxmaml.types import AtStep, Info, LossFn, Mask, MetaLearner, State


def imaml(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    *,
    proximal: float = 1.0,
    num_cg_steps: int = 5,
    cg_tol: float = 1e-10,
    outer_loss_fn: LossFn | None = None,
    mask: Mask = None,
    at_step: AtStep = inner.fold_keys,
    has_state: bool = False,
) -> MetaLearner:
    """MAML whose meta-gradient is that of a proximal minimum, whatever path led there.

    Each task minimises loss(phi, support) + proximal / 2 ||phi - theta||² (equation 3 of the paper) by
    `num_inner_steps` of `optimizer`; the meta-gradient (I + H / proximal)^-1 d query_loss / d phi
    (equation 6), with H the support loss's Hessian at phi, is solved for by conjugate gradients on
    Hessian-vector products. No inner step is differentiated, so that memory does not grow with their
    number. It is as right as phi is a minimum and the solver has converged:
    `diagnostics.cg_residual` says how far it has, since a backward pass cannot return it.

    Whatever the loss closes over is differentiated too, by the implicit function theorem.

    Args:
        loss_fn, outer_loss_fn, mask, at_step, has_state: as in `jaxmaml.maml`.
        optimizer: the inner optimiser; the paper's is gradient descent.
        num_inner_steps: enough of them to come near the minimum; the paper makes 16 to 25.
        proximal: strength of the pull towards theta (lambda in the paper: 0.5 to 2).
        num_cg_steps: the most steps of conjugate gradients; the paper makes 5.
        cg_tol: the relative residual at which they stop earlier.

    Raises:
        ValueError: `proximal` is not positive, `num_cg_steps` below 1; when called, for another
            learner's parameters.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2) / 2
        >>> learner = jaxmaml.imaml(loss_fn, optax.sgd(0.5), 1)  # reaches (theta + 1) / 2
        >>> task = jaxmaml.Task(support=jnp.ones(4), query=jnp.ones(4))
        >>> float(jax.grad(learner.loss, has_aux=True)(jnp.array(0.0), task)[0])
        -0.25
    """
    _check(proximal, num_cg_steps)
    default = inner.check_num_inner_steps(num_inner_steps)
    score = loss_fn if outer_loss_fn is None else outer_loss_fn

    def pulled(theta):
        """The inner problem: the support loss and the pull towards theta."""

        def objective(phi, batch, *state):
            out = loss_fn(phi, batch, *state)
            loss, rest = (out[0], out[1:]) if has_state else (out, ())
            check_scalar(loss)
            pull = optax.tree.norm(optax.tree.sub(phi, theta), squared=True)
            loss = loss + (proximal / 2 * pull).astype(loss.dtype)
            return (loss, *rest) if has_state else loss

        return objective

    def run(function, theta, support, *view, state, number):
        return function(
            pulled(theta), theta, support, *view, optimizer, number,
            order="first", mask=mask, at_step=at_step, has_state=has_state, state=state,
        )  # fmt: skip

    def adapt(meta_params, support, *, state=(), num_inner_steps=None):
        theta = bare(meta_params)
        number = default if num_inner_steps is None else num_inner_steps
        leaves, treedef = jax.tree.flatten(theta)
        flags = inner.is_adapted(theta, mask)
        whole = lambda selected: treedef.unflatten(merge_leaves(flags, selected, leaves))

        def stationarity(selected):
            objective = lambda selected: _loss_only(
                pulled(theta)(*at_step(whole(selected), support, number), *_given(state, has_state))
            )
            return jax.grad(objective)(selected)

        def solve(_, selected):
            del selected
            adapted, info = run(inner.adapt, theta, support, state=state, number=number)
            return select_leaves(flags, jax.tree.leaves(adapted)), info

        def tangent_solve(hessian, rhs):
            return conjugate_gradients(hessian, rhs, num_cg_steps, cg_tol)

        selected, info = jax.lax.custom_root(
            stationarity, select_leaves(flags, leaves), solve, tangent_solve, has_aux=True
        )
        return whole(selected), info

    def trace(meta_params, support, view, *, state=(), num_inner_steps=None):
        number = default if num_inner_steps is None else num_inner_steps
        return run(inner.trace, bare(meta_params), support, view, state=state, number=number)

    def loss(meta_params, task, *, step=0, state=()):
        del step
        adapted, info = adapt(meta_params, task.support, state=state)
        out = score(adapted, task.query, *_given(info.state, has_state))
        query_loss, state = out if has_state else (out, info.state)
        check_scalar(query_loss)
        return query_loss, Info(query_loss, info.inner_losses, state)

    return MetaLearner(init=lambda params: params, adapt=adapt, trace=trace, loss=loss)


def conjugate_gradients(
    matrix: Callable[[Any], Any], rhs: Any, num_cg_steps: int, cg_tol: float
) -> Any:
    """Solves matrix(x) = rhs, for a symmetric positive definite linear map of pytrees."""

    def solve(matrix, rhs):
        # Zeros made of `rhs` are spread over devices as it is; those of JAX's own default are not.
        first = jax.tree.map(lambda leaf: 0 * leaf, rhs)
        return jax.scipy.sparse.linalg.cg(matrix, rhs, first, tol=cg_tol, maxiter=num_cg_steps)[0]

    return jax.lax.custom_linear_solve(matrix, rhs, solve, symmetric=True)


def _given(state: State, has_state: bool) -> tuple[Any, ...]:
    return (state,) if has_state else ()


def _loss_only(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out


def _check(proximal: float, num_cg_steps: int) -> None:
    if not proximal > 0:
        raise ValueError(f"proximal must be positive; got {proximal!r}")
    if num_cg_steps < 1:
        raise ValueError(f"num_cg_steps must be 1 or more; got {num_cg_steps!r}")
