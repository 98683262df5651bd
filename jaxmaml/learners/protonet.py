"""Prototypical networks: Snell, Swersky and Zemel 2017 (arXiv 1703.05175)."""

from collections.abc import Mapping
from typing import Any

from jaxmaml.learners import heads
from jaxmaml.learners.head_filling import head_filling
from jaxmaml.types import Batch, LossFn, MetaLearner, Params


def protonet(
    loss_fn: LossFn, features_fn: heads.FeaturesFn, *, head: str = "head", way: int | None = None
) -> MetaLearner:
    """Returns a classifier by the nearest class mean, in squared Euclidean distance of features.

    -||f - c_k||² = 2 c_k·f - ||c_k||² - ||f||². The last term is the same for all classes, so the head
    gets the kernel 2 c_k and the bias -||c_k||² (equation 8 of the paper): the adapted model is the
    same model. Its initial head is not used, and the gradient of that head is zero.

    Args:
        loss_fn: cross-entropy of the whole model, `(params, batch) -> loss`.
        features_fn: `(params, batch) -> [num_examples, num_features]`, the input of the head.
        head: path of the head, a mapping with "kernel" and "bias".
        way: number of classes; any number works. Defaults to that of the head. Classes without
            support examples have the probability 0.

    Raises:
        ValueError: when called, if `head` is not a linear layer with a bias, or for inner steps.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxmaml
        >>> features_fn = lambda params, batch: batch["inputs"] @ params["body"]
        >>> def loss_fn(params, batch):
        ...     logits = features_fn(params, batch) @ params["head"]["kernel"] + params["head"]["bias"]
        ...     losses = optax.losses.softmax_cross_entropy_with_integer_labels(
        ...         logits, batch["targets"]
        ...     )
        ...     return losses.mean()
        >>> params = {"body": jnp.eye(2), "head": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}}
        >>> support = {"inputs": jnp.array([[1.0, 0.0], [0.0, 3.0]]), "targets": jnp.array([0, 1])}
        >>> adapted, _ = jaxmaml.protonet(loss_fn, features_fn).adapt(params, support)
        >>> adapted["head"]["kernel"].tolist(), adapted["head"]["bias"].tolist()
        ([[2.0, 0.0], [0.0, 6.0]], [-1.0, -9.0])
    """
    prototypes = heads.prototype_head(features_fn, head, way)

    def fill(params: Params, learned: Mapping[str, Any], support: Batch) -> Params:
        del learned
        return prototypes(params, support)

    return head_filling(loss_fn, fill)
