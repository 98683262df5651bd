"""Reptile: Nichol, Achiam and Schulman 2018 (arXiv 1803.02999)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmaml.adjoints import FirstOrder
from jaxmaml.learners.inner_loop import LoopOptions, inner_loop, refuse_learned
from jaxmaml.mixed_mode import check_scalar
from jaxmaml.types import (
    Array,
    Batch,
    Info,
    LossFn,
    MetaLearner,
    Params,
    Scalar,
    State,
    Task,
    as_stateful,
)


def reptile(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    *,
    join_query: bool = True,
    query_loss_fn: LossFn | None = None,
    test_loss_fn: LossFn | None = None,
    **options: Any,
) -> MetaLearner:
    """Returns Reptile, which moves the initial parameters towards the adapted ones.

    The meta-gradient is theta - adapted (algorithm 1 of the paper), the derivative of
    0.5 ||theta - stop_gradient(adapted)||²; no derivative passes the inner loop. The outer step size
    of the paper is the learning rate of an outer `optax.sgd`; Adam works too. The inner optimizer
    starts each task anew, whereas in the authors' code the second moment of its Adam is carried from
    task to task. `info.query_loss` is
    the query loss of the adapted parameters, for plots: it is not what is differentiated.

    Args:
        loss_fn, optimizer, num_inner_steps: as in `jaxmaml.maml`. With a single step it is joint
            training (section 5.1 of the paper).
        join_query: whether training adapts on support and query together, since the paper does not
            divide the data of a task. Leaves are joined along their first axis; leaves without one,
            such as a key, are those of the support. False adapts on the support alone.
        query_loss_fn, test_loss_fn: as in `jaxmaml.maml`.
        options: `mask` and `at_step`, as in `jaxmaml.maml`. An `at_step` that picks rows of the batch
            makes minibatches of it.

    Raises:
        ValueError: the optimizer is a `LearnedOptimizer`.
        TypeError: an option that has no meaning here, such as `adjoint`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2) / 2
        >>> learner = jaxmaml.reptile(loss_fn, optax.sgd(0.5), 2)
        >>> task = jaxmaml.Task(support=jnp.ones(4), query=jnp.ones(4))
        >>> float(jax.grad(learner.loss, has_aux=True)(jnp.array(0.0), task)[0])
        -0.75
    """
    refuse_learned(optimizer, "reptile")
    check_options("reptile", options)
    # In tests it adapts on `test_loss_fn`, in training on `loss_fn`: two inner loops.
    options = {"adjoint": FirstOrder(), **options}
    tested = inner_loop(
        loss_fn, optimizer, num_inner_steps, LoopOptions(test_loss_fn=test_loss_fn, **options)
    )
    trained = inner_loop(loss_fn, optimizer, num_inner_steps, LoopOptions(**options))
    score = as_stateful(loss_fn if query_loss_fn is None else query_loss_fn)

    def loss(
        meta_params: Params, task: Task, *, step: Scalar = 0, state: State = ()
    ) -> tuple[Array, Info]:
        del step
        batch = joined(task) if join_query else task.support
        adapted, info = jax.lax.stop_gradient(trained.adapt(meta_params, batch, state=state))
        query_loss, state = score(adapted, task.query, info.state)
        check_scalar(query_loss)
        return half_squared_distance(meta_params, adapted), Info(
            query_loss, info.inner_losses, state
        )

    return tested._replace(loss=loss)


def check_options(learner: str, options: dict[str, Any]) -> None:
    """Raises TypeError for options other than `mask` and `at_step`."""
    unknown = sorted(set(options) - {"mask", "at_step"})
    if unknown:
        raise TypeError(
            f"{learner} differentiates no inner step and takes no {', '.join(unknown)}: "
            "its options are mask and at_step"
        )


def half_squared_distance(params: Params, target: Params) -> Array:
    """Returns 0.5 ||params - target||² over the whole tree; its gradient is params - target.

    Example:
        >>> import jax.numpy as jnp
        >>> float(half_squared_distance(jnp.array([3.0, 4.0]), jnp.zeros(2)))
        12.5
    """
    return optax.tree.norm(optax.tree.sub(params, target), squared=True) / 2


def joined(task: Task) -> Batch:
    """Returns support and query as one batch.

    Example:
        >>> import jax.numpy as jnp, jaxmaml
        >>> joined(jaxmaml.Task(jnp.zeros((2, 3)), jnp.zeros((5, 3)))).shape
        (7, 3)
    """

    def join(support: Array, query: Array) -> Array:
        return jnp.concatenate([support, query]) if jnp.ndim(support) else support

    return jax.tree.map(join, *task)
