"""Reptile: Nichol, Achiam and Schulman 2018 (arXiv 1803.02999)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmaml import inner
from jaxmaml.learners.maml import maml
from jaxmaml.mixed_mode import check_scalar
from jaxmaml.types import AtStep, Batch, Info, LossFn, Mask, MetaLearner, Task


def reptile(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    *,
    join_query: bool = True,
    outer_loss_fn: LossFn | None = None,
    test_loss_fn: LossFn | None = None,
    mask: Mask = None,
    at_step: AtStep = inner.fold_keys,
    has_state: bool = False,
) -> MetaLearner:
    """Moves the initial parameters towards the adapted ones; no derivative passes the inner loop.

    The meta-gradient is theta - adapted (algorithm 1 of the paper), as the derivative of
    0.5 ||theta - stop_gradient(adapted)||². The paper's outer step size is the learning rate of an
    outer `optax.sgd`; Adam works too. `info.query_loss` is the query loss of the adapted parameters,
    for plots: it is not what is differentiated.

    Args:
        loss_fn, optimizer, num_inner_steps: as in `jaxmaml.maml`. More than one step, or it is joint
            training (section 5.1 of the paper).
        join_query: in training, adapt on support and query together, since the paper does not
            divide a task's data; leaves are joined along their first axis, those without one (a key)
            are the support's. With False, on the support alone.
        outer_loss_fn, test_loss_fn, mask, at_step, has_state: as in `jaxmaml.maml`. An `at_step` that
            picks rows of the batch makes minibatches of it.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2) / 2
        >>> learner = jaxmaml.reptile(loss_fn, optax.sgd(0.5), 2)
        >>> task = jaxmaml.Task(support=jnp.ones(4), query=jnp.ones(4))
        >>> float(jax.grad(learner.loss, has_aux=True)(jnp.array(0.0), task)[0])
        -0.75
    """
    options: dict[str, Any] = {
        "order": "first", "mask": mask, "at_step": at_step, "has_state": has_state
    }  # fmt: skip
    learner = maml(loss_fn, optimizer, num_inner_steps, test_loss_fn=test_loss_fn, **options)
    trained = maml(loss_fn, optimizer, num_inner_steps, **options)
    score = loss_fn if outer_loss_fn is None else outer_loss_fn

    def loss(meta_params, task, *, step=0, state=()):
        del step
        data = joined(task) if join_query else task.support
        adapted, info = jax.lax.stop_gradient(trained.adapt(meta_params, data, state=state))
        out = score(adapted, task.query, *((info.state,) if has_state else ()))
        query_loss, state = out if has_state else (out, info.state)
        check_scalar(query_loss)
        return surrogate(meta_params, adapted), Info(query_loss, info.inner_losses, state)

    return learner._replace(loss=loss)


def surrogate(params: Any, target: Any) -> Any:
    """0.5 ||params - target||², over the whole tree; its gradient is params - target."""
    return optax.tree.norm(optax.tree.sub(params, target), squared=True) / 2


def joined(task: Task) -> Batch:
    """Support and query as one batch."""

    def join(support, query):
        return jnp.concatenate([support, query]) if jnp.ndim(support) else support

    return jax.tree.map(join, *task)
