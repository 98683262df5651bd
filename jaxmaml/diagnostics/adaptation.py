"""Measures of the inner loop, step by step."""

from typing import Any

import jax
import optax

from jaxmaml import trees
from jaxmaml.trees import by_layer
from jaxmaml.types import (
    Array,
    Batch,
    LossFn,
    MetaLearner,
    MetaParams,
    Params,
    State,
    Task,
    as_stateful,
)


def inner_losses(
    learner: MetaLearner,
    loss_fn: LossFn,
    meta_params: MetaParams,
    task: Task,
    *,
    state: State = (),
    num_inner_steps: int | None = None,
) -> dict[str, Array]:
    """Returns the loss on the support and on the query after 0, 1, .. n inner steps.

    Args:
        learner: the meta-learner.
        loss_fn: the loss that is reported, in either form. It sees both batches as they are, whereas
            the inner loop folds its step into their keys, or draws a minibatch of the support.
        meta_params: the meta-parameters of the learner.
        task: one task.
        state: the state of the loss function.
        num_inner_steps: inner steps n. Defaults to those of training.

    Returns:
        {"support": `[n + 1]`, "query": `[n + 1]`}, in the units of the loss.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2)
        >>> learner = jaxmaml.maml(loss_fn, optax.sgd(0.25), 2)
        >>> task = jaxmaml.Task(support=jnp.ones(4), query=2 * jnp.ones(4))
        >>> losses = inner_losses(learner, loss_fn, jnp.array(0.0), task)
        >>> losses["support"].tolist(), losses["query"].tolist()
        ([1.0, 0.25, 0.0625], [4.0, 2.25, 1.5625])
    """
    stateful = as_stateful(loss_fn)

    def view(adapted: Params, state: State) -> dict[str, Array]:
        return {name: stateful(adapted, batch, state)[0] for name, batch in task._asdict().items()}

    return learner.trace(
        meta_params, task.support, view, state=state, num_inner_steps=num_inner_steps
    )


def update_norms(
    learner: MetaLearner,
    meta_params: MetaParams,
    support: Batch,
    *,
    depth: int | None = None,
    state: State = (),
    num_inner_steps: int | None = None,
) -> dict[str, tuple[Array, Array]]:
    """Returns how far the inner loop has moved each layer after 0, 1, .. n inner steps.

    Args:
        learner: the meta-learner. The parameters that its `trace` shows are compared with those after
            no step, so that a head that is filled in beforehand has not moved.
        meta_params: the meta-parameters of the learner.
        support: the support of one task.
        depth: the number of components of a leaf's path that make its layer, see
            `agreement_by_layer`.
        state: the state of the loss function.
        num_inner_steps: inner steps n. Defaults to those of training.

    Returns:
        {path of the layer: (Euclidean norm of the change `[n + 1]`, the same divided by the norm of
        the layer's parameters before the first step `[n + 1]`)}. A layer that starts from zero has no
        relative change: it is NaN or inf.

    Raises:
        ValueError: the depth is below 1.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params["w"] - batch) ** 2)
        >>> learner = jaxmaml.maml(loss_fn, optax.sgd(0.25), 2)
        >>> norms, relative = update_norms(learner, {"w": jnp.array(2.0)}, jnp.zeros(4))["w"]
        >>> norms.tolist(), relative.tolist()
        ([0.0, 1.0, 1.5], [0.0, 0.5, 0.75])
    """
    # The parameters after no step: the meta-parameters may be more than what a learner starts from.
    all_params = lambda adapted, state: adapted
    start = learner.trace(meta_params, support, all_params, state=state, num_inner_steps=0)
    start = jax.tree.map(lambda leaf: leaf[0], start)

    def view(adapted: Params, state: State) -> dict[str, Array]:
        del state
        change = optax.tree.sub(trees.in_float32(adapted), trees.in_float32(start))
        return _layer_norms(change, depth)

    norms = learner.trace(meta_params, support, view, state=state, num_inner_steps=num_inner_steps)
    sizes = _layer_norms(start, depth)
    return {layer: (norms[layer], norms[layer] / size) for layer, size in sizes.items()}


def _layer_norms(tree: Any, depth: int | None) -> dict[str, Array]:
    return {layer: trees.norm(leaves) for layer, leaves in by_layer(tree, depth).items()}
