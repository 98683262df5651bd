"""How well the implicit meta-gradient of iMAML has been solved for."""

from typing import Any

import jax
import optax

from jaxmaml import inner
from jaxmaml.learners.imaml import conjugate_gradients
from jaxmaml.mixed_mode import merge_leaves, select_leaves
from jaxmaml.types import Array, LossFn, Mask, MetaLearner, MetaParams, Task


def cg_residual(
    learner: MetaLearner,
    loss_fn: LossFn,
    meta_params: MetaParams,
    task: Task,
    *,
    proximal: float = 1.0,
    num_cg_steps: int = 5,
    cg_tol: float = 1e-10,
    mask: Mask = None,
) -> tuple[Array, Array]:
    """How far from a solution iMAML's conjugate gradients stop, and how far from a minimum its loop.

    The backward pass of `jaxmaml.imaml` cannot return this: it is computed again here.

    Args:
        learner: an iMAML.
        loss_fn, proximal, num_cg_steps, cg_tol, mask: what it was made with.
        meta_params: its initial parameters.
        task: one task.

    Returns:
        (||A v - b|| / ||b|| with A = H + proximal I and b the query gradient at the adapted
        parameters, ||inner gradient|| / ||inner gradient at the start||). Both are 0 at best; above
        0.1 or so the meta-gradient is not to be trusted: more steps, or a larger `proximal`. Where
        H has an eigenvalue below -proximal, A is not positive and no number of steps will do.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2) / 2
        >>> learner = jaxmaml.imaml(loss_fn, optax.sgd(0.5), 1)
        >>> task = jaxmaml.Task(support=jnp.ones(4), query=jnp.ones(4))
        >>> residual, gradient = cg_residual(learner, loss_fn, jnp.array(0.0), task)
        >>> float(residual), float(gradient)
        (0.0, 0.0)
    """

    leaves, treedef = jax.tree.flatten(meta_params)
    flags = inner.is_adapted(meta_params, mask)
    select = lambda tree: select_leaves(flags, jax.tree.leaves(tree))
    whole = lambda selected: treedef.unflatten(merge_leaves(flags, selected, leaves))
    of_loss = lambda selected, batch: jax.grad(lambda s: loss_fn(whole(s), batch))(selected)

    def inner_gradient(selected: Any) -> Any:
        pull = optax.tree.scale(proximal, optax.tree.sub(selected, select(meta_params)))
        return optax.tree.add(of_loss(selected, task.support), pull)

    def matrix(vector: Any) -> Any:
        return jax.jvp(inner_gradient, (adapted,), (vector,))[1]

    adapted = select(learner.adapt(meta_params, task.support)[0])
    rhs = of_loss(adapted, task.query)
    solution = conjugate_gradients(matrix, rhs, num_cg_steps, cg_tol)
    left = optax.tree.norm(optax.tree.sub(matrix(solution), rhs)) / optax.tree.norm(rhs)
    start = optax.tree.norm(inner_gradient(select(meta_params)))
    return left, optax.tree.norm(inner_gradient(adapted)) / start
