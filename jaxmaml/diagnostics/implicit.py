"""The accuracy of the implicit meta-gradient of iMAML."""

from typing import Any, NamedTuple

import jax
import optax

from jaxmaml import inner
from jaxmaml.adjoints import Implicit
from jaxmaml.learners.inner_loop import algorithm_of, begin, query_loss_of
from jaxmaml.types import Array, MetaLearner, MetaParams, State, Task


class CgResidual(NamedTuple):
    """The distance of an implicit meta-gradient from the exact one. All numbers are 0 at best.

    Attributes:
        solver: ||(A + damping I) v - b|| / ||b||, where A is the Hessian of the inner loss and b the
            query gradient at the adapted parameters: the error of the conjugate gradients.
        undamped: ||A v - b|| / ||b||: the same with the error of the damping.
        minimum: ||inner gradient|| / ||inner gradient at the start||, which is 0 at a minimum.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2) / 2
        >>> learner = jaxmaml.imaml(loss_fn, optax.sgd(0.5), 1, damping=2.0)  # the Hessian plus 1 is 2
        >>> task = jaxmaml.Task(support=jnp.ones(4), query=jnp.ones(4))
        >>> found = cg_residual(learner, jnp.array(0.0), task)
        >>> float(found.solver), float(found.undamped)
        (0.0, 0.5)
    """

    solver: Array
    undamped: Array
    minimum: Array


def cg_residual(
    learner: MetaLearner, meta_params: MetaParams, task: Task, *, state: State = ()
) -> CgResidual:
    """Returns how far iMAML's conjugate gradients are from a solution, and its loop from a minimum.

    The backward pass of `jaxmaml.imaml` cannot return this: it is computed again here, with the
    options that the learner was made with.

    Args:
        learner: a learner with the adjoint `Implicit`, such as `jaxmaml.imaml`.
        meta_params: its meta-parameters.
        task: one task.
        state: the state of the loss function.

    Returns:
        The residuals. Above about 0.1 the meta-gradient is not the exact one: make more steps of
        either kind, or use a larger `proximal`. If A has a negative eigenvalue below -damping, no
        number of steps is enough: with a solver residual of 1 and more, the meta-gradient is
        meaningless. Damping mends that, for an approximation that `undamped` measures.

    Raises:
        ValueError: the learner has no implicit adjoint.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2) / 2
        >>> learner = jaxmaml.imaml(loss_fn, optax.sgd(0.5), 1)
        >>> task = jaxmaml.Task(support=jnp.ones(4), query=jnp.ones(4))
        >>> [float(residual) for residual in cg_residual(learner, jnp.array(0.0), task)]
        [0.0, 0.0, 0.0]
    """
    algorithm = algorithm_of(learner)
    options = algorithm.options
    if not isinstance(options.adjoint, Implicit):
        raise ValueError(f"cg_residual needs a learner with Implicit(); got {options.adjoint!r}")

    # The inner loop of training, and the gradients of both losses where it ends.
    problem = begin(algorithm, algorithm.loss_fn, meta_params, task.support, state)
    loop, start = inner.make_loop(
        problem.loss_fn, problem.start.params, task.support, problem.optimizer,
        options.adjoint, options.mask, options.at_step,
    )  # fmt: skip
    last, state = algorithm.num_inner_steps, problem.start.state
    selected, (state_after, *_) = loop.solve(start, state, last)
    inner_gradient = lambda selected: loop.gradient(selected, state_after, last)
    query_loss = lambda selected: query_loss_of(
        algorithm, task, loop.adapted(selected, last), state_after
    )

    # The linear system of the backward pass, and what its solution leaves.
    matrix = lambda vector: jax.jvp(inner_gradient, (selected,), (vector,))[1]
    rhs = jax.grad(query_loss, has_aux=True)(selected)[0]
    solution = options.adjoint.solve_linear(matrix, rhs)
    undamped = optax.tree.sub(matrix(solution), rhs)
    damped = optax.tree.add(undamped, optax.tree.scale(options.adjoint.damping, solution))

    def relative(vector: Any, whole: Any) -> Array:
        return optax.tree.norm(vector) / optax.tree.norm(whole)

    return CgResidual(
        solver=relative(damped, rhs),
        undamped=relative(undamped, rhs),
        minimum=relative(inner_gradient(selected), inner_gradient(start)),
    )
