"""Prototypical networks: Snell, Swersky and Zemel 2017 (arXiv 1703.05175)."""

from jaxmaml.learners import heads
from jaxmaml.learners.head_filling import bare_fill, head_filling
from jaxmaml.types import Batch, LossFn, MetaLearner, Params


def protonet(
    loss_fn: LossFn, features_fn: heads.FeaturesFn, *, head: str = "head", way: int | None = None
) -> MetaLearner:
    """Classifies by the nearest class mean, in squared Euclidean distance between features.

    -||f - c_k||² = 2 c_k·f - ||c_k||² - ||f||², of which the last term is alike for all classes: the
    head is filled with the kernel 2 c_k and the bias -||c_k||² (equation 8 of the paper), so that
    what is adapted is the same model. Its initial head is not used, and its gradient is zero.

    Args:
        loss_fn: cross-entropy of the whole model, `(params, batch) -> loss`.
        features_fn: `(params, batch) -> [num_examples, num_features]`, what the head is given.
        head: path of the head, a mapping with "kernel" and "bias".
        way: number of classes, where it is not that of the head: any will do.

    Raises:
        ValueError: when called, if `head` is no linear layer with a bias, or inner steps are asked for.

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
    return head_filling(loss_fn, bare_fill(prototype_head(features_fn, head, way)))


def prototype_head(features_fn: heads.FeaturesFn, head: str, way: int | None):
    """`(params, support) -> params` whose head measures the distance to the class means."""

    def fill(params: Params, support: Batch) -> Params:
        number = heads.way_of(params, head, way)
        means = heads.prototypes(features_fn(params, support), support, number)
        return heads.fill(params, head, 2 * means.T, -(means**2).sum(-1))

    return fill
