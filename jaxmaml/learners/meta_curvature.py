"""Meta-curvature: Park and Oliva 2019 (arXiv 1902.03356)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmaml.learners.learned_optimizer import learned_optimizer
from jaxmaml.types import Array, LossFn, MetaLearner, Params


def meta_curvature(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    **options: Any,
) -> MetaLearner:
    """MAML that meta-learns a preconditioner of the inner gradients, one matrix for each axis.

    An array of the parameters with axes of sizes d_1..d_k has matrices M_i `[d_i, d_i]`, which start
    as the identity and multiply the gradient along their axis (equation 6 of the paper, whose spatial
    axes of a convolution are one; here the two spatial axes have a matrix each). Meta-parameters:
    `Extended(params, {"hyperparams": [matrices of each array]})`.

    Args:
        loss_fn, num_inner_steps: as in `jaxmaml.maml`.
        optimizer: takes the preconditioned gradients; the paper's is SGD.
        options: keyword arguments of `jaxmaml.maml`.

    Raises:
        ValueError: when called, for another learner's parameters.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2) / 2
        >>> learner = jaxmaml.meta_curvature(loss_fn, optax.sgd(0.5), 1)
        >>> learner.init(jnp.zeros(2)).learned["hyperparams"][0][0].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """

    def make_optimizer(curvature: Any) -> optax.GradientTransformation:
        return optax.chain(precondition(curvature), optimizer)

    return learned_optimizer(loss_fn, make_optimizer, identities, num_inner_steps, **options)


def identities(params: Params) -> list[list[Array]]:
    """For each array of the parameters, in the order of `jax.tree.leaves`, an identity an axis."""
    return [
        [jnp.eye(size, dtype=leaf.dtype) for size in leaf.shape] for leaf in jax.tree.leaves(params)
    ]


def precondition(curvature: list[list[Array]]) -> optax.GradientTransformation:
    """An optax transformation that multiplies each axis of each gradient by its matrix."""

    def update(updates, params=None):
        del params
        leaves, treedef = jax.tree.flatten(updates, is_leaf=_is_masked)
        pairs = zip(leaves, curvature, strict=True)
        return treedef.unflatten(
            [leaf if _is_masked(leaf) else _multiplied(leaf, m) for leaf, m in pairs]
        )

    return optax.stateless(update)


def _multiplied(gradient: Array, matrices: list[Array]) -> Array:
    for axis, matrix in enumerate(matrices):
        gradient = jnp.moveaxis(jnp.tensordot(matrix, gradient, (1, axis)), 0, axis)
    return gradient


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)
