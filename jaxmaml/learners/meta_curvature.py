"""Meta-curvature: Park and Oliva 2019 (arXiv 1902.03356)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmaml.learners.hyperparams import LearnedOptimizer, Optimizer
from jaxmaml.learners.maml import maml
from jaxmaml.types import Array, LossFn, MetaLearner, Params


def meta_curvature(
    loss_fn: LossFn,
    optimizer: Optimizer,
    num_inner_steps: int,
    **options: Any,
) -> MetaLearner:
    """Returns MAML that learns a preconditioner of the inner gradients, one matrix per axis.

    An array of the parameters with axes of sizes d_1..d_k has matrices M_i `[d_i, d_i]`, which start
    as the identity and multiply the gradient along their axis. This is equation 6 of the paper, where
    both spatial axes of a convolution share one matrix; here each has its own. A bias has a full matrix
    here, where common PyTorch codes learn one factor per entry. The meta-parameters
    are `Extended(params, {"hyperparams": [matrices of each adapted array]})`.

    Args:
        loss_fn, num_inner_steps: as in `jaxmaml.maml`.
        optimizer: takes the preconditioned gradients; the paper's is SGD. With a
            `LearnedOptimizer` the learned values are {"curvature": matrices, "optimizer": its own}.
        options: keyword arguments of `jaxmaml.maml`.

    Raises:
        ValueError: when called, for the meta-parameters of another learner.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2) / 2
        >>> learner = jaxmaml.meta_curvature(loss_fn, optax.sgd(0.5), 1)
        >>> learner.init(jnp.zeros(2)).learned["hyperparams"][0][0].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    if isinstance(optimizer, LearnedOptimizer):
        learned = LearnedOptimizer(
            init=lambda params: {
                "curvature": identities(params), "optimizer": optimizer.init(params)
            },
            make=lambda values: optax.chain(
                precondition(values["curvature"]), optimizer.make(values["optimizer"])
            ),
        )  # fmt: skip
    else:
        learned = LearnedOptimizer(
            init=identities, make=lambda curvature: optax.chain(precondition(curvature), optimizer)
        )
    return maml(loss_fn, learned, num_inner_steps, **options)


def identities(params: Params) -> list[list[Array]]:
    """Returns an identity matrix per axis of each array, in the order of `jax.tree.leaves`.

    Example:
        >>> import jax.numpy as jnp
        >>> [matrix.shape for matrix in identities(jnp.zeros((2, 3)))[0]]
        [(2, 2), (3, 3)]
    """
    return [
        [jnp.eye(size, dtype=jnp.result_type(leaf)) for size in jnp.shape(leaf)]
        for leaf in jax.tree.leaves(params)
    ]


def precondition(curvature: list[list[Array]]) -> optax.GradientTransformation:
    """Returns an optax transformation that multiplies each axis of each gradient by its matrix."""

    def update(updates: Params, params: Params | None = None) -> Params:
        del params
        leaves, treedef = jax.tree.flatten(updates)
        pairs = zip(leaves, curvature, strict=True)
        return treedef.unflatten([_multiplied(leaf, matrices) for leaf, matrices in pairs])

    return optax.stateless(update)


def _multiplied(gradient: Array, matrices: list[Array]) -> Array:
    for axis, matrix in enumerate(matrices):
        gradient = jnp.moveaxis(jnp.tensordot(matrix, gradient, (1, axis)), 0, axis)
    return gradient
