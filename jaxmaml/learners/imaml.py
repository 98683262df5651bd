"""Implicit MAML: Rajeswaran, Finn, Kakade and Levine 2019 (arXiv 1909.04630)."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import optax

from jaxmaml.adjoints import Implicit
from jaxmaml.learners.inner_loop import Start, inner_loop, loop_options, refuse_learned
from jaxmaml.types import Array, Batch, LossFn, MetaLearner, Params, State


def imaml(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    *,
    proximal: float = 1.0,
    num_cg_steps: int = 5,
    cg_tol: float = 1e-10,
    damping: float = 0.0,
    unroll: int = 1,
    **options: Any,
) -> MetaLearner:
    """Returns MAML on a proximal inner loss, differentiated at its minimum.

    Each task minimizes loss(phi, support) + proximal / 2 ||phi - theta||² (equation 3 of the paper)
    by `num_inner_steps` of `optimizer`. The meta-gradient is (I + H / proximal)^-1 times the gradient
    of the query loss at phi (equation 6), where H is the Hessian of the support loss at phi. It
    is `jaxmaml.maml` on this inner loss with the adjoint `Implicit`, whose documentation says when it
    is accurate.

    Args:
        loss_fn: as in `jaxmaml.maml`.
        optimizer: the inner optimizer; the paper's is gradient descent.
        num_inner_steps: enough to come near the minimum; the paper makes 16 to 25.
        proximal: the strength of the pull towards theta, positive (lambda in the paper: 0.5 to 2).
        num_cg_steps, cg_tol, damping, unroll: see `jaxmaml.Implicit`; the paper makes 5 steps. Damping
            is needed where the Hessian is far from positive definite, as with batch statistics. The
            authors' published script has the matrix 2 I + H / (proximal + 10), that of a damping of
            20 plus the proximal term once more.
        options: keyword arguments of `jaxmaml.maml` other than `adjoint`.

    Raises:
        ValueError: `proximal` is not positive, an option of `Implicit` is out of its range, or
            the optimizer is a `LearnedOptimizer`; when called, for the meta-parameters of another
            learner.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2) / 2
        >>> learner = jaxmaml.imaml(loss_fn, optax.sgd(0.5), 1)  # reaches (theta + 1) / 2
        >>> task = jaxmaml.Task(support=jnp.ones(4), query=jnp.ones(4))
        >>> float(jax.grad(learner.loss, has_aux=True)(jnp.array(0.0), task)[0])
        -0.25
    """
    if not 0 < proximal < math.inf:
        raise ValueError(f"proximal must be a positive, finite number; got {proximal!r}")
    refuse_learned(optimizer, "imaml")
    adjoint = Implicit(num_cg_steps=num_cg_steps, cg_tol=cg_tol, damping=damping, unroll=unroll)

    def start(params: Params, learned: Mapping[str, Any], support: Batch, state: State) -> Start:
        del learned, support
        return Start(params, state, functools.partial(_pull, proximal, params))

    settings = loop_options("imaml", options, adjoint=adjoint)
    return inner_loop(loss_fn, optimizer, num_inner_steps, settings, start=start)


def _pull(proximal: float, theta: Params, phi: Params) -> Array:
    """The proximal term of the inner loss."""
    return proximal / 2 * optax.tree.norm(optax.tree.sub(phi, theta), squared=True)
