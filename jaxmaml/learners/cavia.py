"""CAVIA: Zintgraf, Shiarlis, Kurin, Hofmann and Whiteson 2019 (arXiv 1810.03642)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmaml import trees
from jaxmaml.learners.hyperparams import Optimizer
from jaxmaml.learners.inner_loop import Start
from jaxmaml.learners.masked import masked_inner_loop
from jaxmaml.types import Batch, LossFn, MetaLearner, Params, State


def cavia(
    loss_fn: LossFn,
    optimizer: Optimizer,
    num_inner_steps: int,
    *,
    context: str = "context",
    **options: Any,
) -> MetaLearner:
    """Returns MAML whose inner loop adapts context parameters only, which start a task as zeros.

    Equations 3 to 5 of the paper. The model takes some of its parameters as context, in any way: as
    an added input, or as a scale and shift of features. Each task starts from zeros, whatever the
    meta-parameters hold there, so that the meta-gradient of the context is zero.

    Args:
        loss_fn, optimizer, num_inner_steps: as in `jaxmaml.maml`. With
            `jaxmaml.learned_sgd` the rates are learned too.
        context: path of the context parameters.
        options: keyword arguments of `jaxmaml.maml` other than `mask`.

    Raises:
        TypeError: a mask is given.
        ValueError: when called, if no parameter lies at `context`, or all of them
            do.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> def loss_fn(params, batch):
        ...     outputs = params["model"] * batch + params["context"]
        ...     return jnp.mean((outputs - 1.0) ** 2) / 2
        >>> learner = jaxmaml.cavia(loss_fn, optax.sgd(0.5), 1)
        >>> adapted, _ = learner.adapt({"model": jnp.array(0.0), "context": jnp.array(9.0)}, jnp.ones(3))
        >>> float(adapted["model"]), float(adapted["context"])
        (0.0, 0.5)
    """
    mask = trees.under_path(context)

    def start(params: Params, learned: Mapping[str, Any], support: Batch, state: State) -> Start:
        del learned, support
        old, others = trees.partition(params, trees.is_adapted(params, mask))
        return Start(trees.combine(jax.tree.map(jnp.zeros_like, old), others), state)

    return masked_inner_loop(
        loss_fn,
        optimizer,
        num_inner_steps,
        options,
        learner="cavia",
        path=context,
        mask=mask,
        start=start,
    )
