"""CAVIA: Zintgraf, Shiarlis, Kurin, Hofmann and Whiteson 2019 (arXiv 1810.03642)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmaml import inner
from jaxmaml.learners.heads import check_path, under_path
from jaxmaml.learners.inner_loop import Start, bare, inner_loop
from jaxmaml.types import LossFn, MetaLearner, Params


def cavia(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    *,
    context: str = "context",
    **options: Any,
) -> MetaLearner:
    """MAML whose inner loop adapts context parameters only, which are zero when a task begins.

    Equations 3 to 5 of the paper. The model takes part of its parameters as context, in whatever way
    it likes (an added input, a scale and shift of features); whatever they hold in the
    meta-parameters, each task starts from zeros, so that their meta-gradient is zero.

    Args:
        loss_fn, optimizer, num_inner_steps: as in `jaxmaml.maml`.
        context: path of the context parameters.
        options: keyword arguments of `jaxmaml.maml` other than `mask`.

    Raises:
        ValueError: when called, if nothing lies at `context`, or nothing beside it.

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
    mask = under_path(context)

    def start(meta_params, support, state):
        del support
        check_path(bare(meta_params), context)
        return Start(_zeroed(meta_params, mask), optimizer, state)

    return inner_loop(loss_fn, start, num_inner_steps, mask=mask, **options)


def _zeroed(params: Params, mask: Any) -> Params:
    leaves, treedef = jax.tree.flatten(params)
    flags = inner.is_adapted(params, mask)
    pairs = zip(flags, leaves, strict=True)
    return treedef.unflatten([jnp.zeros_like(leaf) if flag else leaf for flag, leaf in pairs])
