"""Proto-MAML: Triantafillou et al. 2020 (arXiv 1903.03096), section 2."""

from collections.abc import Mapping
from typing import Any

from jaxmaml.learners import heads
from jaxmaml.learners.hyperparams import Optimizer
from jaxmaml.learners.inner_loop import Start, inner_loop, loop_options
from jaxmaml.types import Batch, LossFn, MetaLearner, Params, State


def proto_maml(
    loss_fn: LossFn,
    optimizer: Optimizer,
    num_inner_steps: int,
    features_fn: heads.FeaturesFn,
    *,
    head: str = "head",
    way: int | None = None,
    **options: Any,
) -> MetaLearner:
    """Returns MAML that starts each task with the head of a prototypical network.

    Any number of ways works. The gradient passes through the prototypes too, as in the paper. After 0
    inner steps it is `jaxmaml.protonet`.

    Args:
        loss_fn, optimizer, num_inner_steps: as in `jaxmaml.maml`. Learned rates should be per layer,
            as for `jaxmaml.unicorn`.
        features_fn, head, way: as in `jaxmaml.protonet`.
        options: keyword arguments of `jaxmaml.maml`.

    Raises:
        ValueError: when called, if `head` is not a linear layer with a bias.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> features_fn = lambda params, batch: batch["inputs"]
        >>> logits = lambda params, x: x @ params["head"]["kernel"] + params["head"]["bias"]
        >>> loss_fn = lambda params, batch: jnp.mean(logits(params, batch["inputs"]) ** 2)
        >>> learner = jaxmaml.proto_maml(loss_fn, optax.sgd(0.1), 0, features_fn)
        >>> params = {"head": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}}
        >>> support = {"inputs": jnp.array([[1.0, 0.0], [0.0, 3.0]]), "targets": jnp.array([0, 1])}
        >>> learner.adapt(params, support)[0]["head"]["bias"].tolist()
        [-1.0, -9.0]
    """
    fill = heads.prototype_head(features_fn, head, way)

    def start(params: Params, learned: Mapping[str, Any], support: Batch, state: State) -> Start:
        del learned
        return Start(fill(params, support), state)

    return inner_loop(
        loss_fn, optimizer, num_inner_steps, loop_options("proto_maml", options), start=start
    )
