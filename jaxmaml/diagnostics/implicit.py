"""The accuracy of the implicit meta-gradient of iMAML."""

from typing import Any

import jax
import optax

from jaxmaml import trees
from jaxmaml.adjoints import Implicit
from jaxmaml.learners.inner_loop import algorithm_of, begin
from jaxmaml.types import Array, MetaLearner, MetaParams, Params, State, Task, as_stateful


def cg_residual(
    learner: MetaLearner, meta_params: MetaParams, task: Task, *, state: State = ()
) -> tuple[Array, Array]:
    """Returns how far iMAML's conjugate gradients are from a solution, and its loop from a minimum.

    The backward pass of `jaxmaml.imaml` cannot return this: it is computed again here, with the
    options that the learner was made with.

    Args:
        learner: a learner with the adjoint `Implicit`, such as `jaxmaml.imaml`.
        meta_params: its meta-parameters.
        task: one task.
        state: the state of the loss function.

    Returns:
        (||A v - b|| / ||b|| where A is the Hessian of the inner loss and b the query gradient at the
        adapted parameters, ||inner gradient|| / ||inner gradient at the start||). Both are 0 at best.
        Above about 0.1 the meta-gradient is not to be trusted: make more steps, or use a larger
        `proximal`. If A has a negative eigenvalue, no number of steps is enough.

    Raises:
        ValueError: the learner has no implicit adjoint.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2) / 2
        >>> learner = jaxmaml.imaml(loss_fn, optax.sgd(0.5), 1)
        >>> task = jaxmaml.Task(support=jnp.ones(4), query=jnp.ones(4))
        >>> residual, gradient = cg_residual(learner, jnp.array(0.0), task)
        >>> float(residual), float(gradient)
        (0.0, 0.0)
    """
    algorithm = algorithm_of(learner)
    options = algorithm.options
    if not isinstance(options.adjoint, Implicit):
        raise ValueError(f"cg_residual needs a learner with Implicit(); got {options.adjoint!r}")

    # The inner and the query gradient, as functions of the parameters that are adapted.
    loop = begin(algorithm, algorithm.loss_fn, meta_params, task.support, state)
    adapted, info = learner.adapt(meta_params, task.support, state=state)
    flags = trees.is_adapted(adapted, options.mask)
    selected, frozen = trees.partition(adapted, flags)
    start = trees.partition(loop.start.params, flags)[0]

    def inner_gradient(selected: Params) -> Params:
        def objective(selected: Params) -> Any:
            params = trees.combine(selected, frozen)
            params, batch = options.at_step(params, task.support, algorithm.num_inner_steps)
            return as_stateful(loop.loss_fn)(params, batch, loop.start.state)[0]

        return jax.grad(objective)(selected)

    def query_loss(selected: Params) -> Any:
        params = trees.combine(selected, frozen)
        return as_stateful(algorithm.query_loss_fn)(params, task.query, info.state)[0]

    # The linear system of the backward pass, and what its solution leaves.
    matrix = lambda vector: jax.jvp(inner_gradient, (selected,), (vector,))[1]
    rhs = jax.grad(query_loss)(selected)
    solution = options.adjoint.solve_linear(matrix, rhs)
    left = optax.tree.norm(optax.tree.sub(matrix(solution), rhs)) / optax.tree.norm(rhs)
    at_start = optax.tree.norm(inner_gradient(start))
    return left, optax.tree.norm(inner_gradient(selected)) / at_start
