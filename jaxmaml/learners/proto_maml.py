"""Proto-MAML: Triantafillou et al. 2020 (arXiv 1903.03096), section 2."""

from typing import Any

import optax

from jaxmaml.learners import heads
from jaxmaml.learners.inner_loop import Start, bare, inner_loop
from jaxmaml.learners.protonet import prototype_head
from jaxmaml.types import LossFn, MetaLearner


def proto_maml(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    features_fn: heads.FeaturesFn,
    *,
    head: str = "head",
    way: int | None = None,
    **options: Any,
) -> MetaLearner:
    """MAML that starts each task with a prototypical network's head; any number of ways.

    The gradient flows through the prototypes too, as in the paper. After 0 steps it is `protonet`.

    Args:
        loss_fn, optimizer, num_inner_steps: as in `jaxmaml.maml`.
        features_fn, head, way: as in `jaxmaml.protonet`.
        options: keyword arguments of `jaxmaml.maml`.

    Raises:
        ValueError: when called, if `head` is no linear layer with a bias.
    """
    fill = prototype_head(features_fn, head, way)

    def start(meta_params, support, state):
        return Start(fill(bare(meta_params), support), optimizer, state)

    return inner_loop(loss_fn, start, num_inner_steps, **options)
