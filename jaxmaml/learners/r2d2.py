"""R2-D2: Bertinetto et al. 2019 (arXiv 1805.08136), ridge regression as the head."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmaml.learners import heads
from jaxmaml.learners.head_filling import head_filling
from jaxmaml.types import Array, Batch, LossFn, MetaLearner, Params


def r2d2(
    loss_fn: LossFn,
    features_fn: heads.FeaturesFn,
    *,
    head: str = "head",
    way: int | None = None,
    ridge: float = 1.0,
    scale: float = 1.0,
) -> MetaLearner:
    """Returns a learner that solves ridge regression from support features to one-hot targets.

    W = Xᵀ (X Xᵀ + l I)⁻¹ Y (equation 4 of the paper, by Woodbury's identity: a system of the size of
    the support) and logits = a X' W + b (equation 6), with l, a and b learned. l and a are stored as
    logarithms, so that they stay positive. Meta-parameters: `Extended(params, {"ridge": {"log_ridge",
    "log_scale", "bias"}})`; the initial head in `params` is not used.

    Args:
        loss_fn: cross-entropy of the whole model, `(params, batch) -> loss`.
        features_fn: `(params, batch) -> [num_examples, num_features]`, the input of the head.
        head: path of the head, a mapping with "kernel" and, in most models, "bias". Without a bias,
            classes that a task does not have keep the logit 0.
        way: number of classes; any number works. Defaults to that of the head.
        ridge: the initial l, positive, in units of the squared norm of an example's features. The
            authors' code appends a column of ones to the features and scales by the number of examples
            n, so that l here is n times theirs.
        scale: the initial a, positive.

    Raises:
        ValueError: `ridge` or `scale` is not positive; when called, if `head` is not a linear layer,
            or for the meta-parameters of another learner.

    Example:
        >>> import jax.numpy as jnp, jaxmaml
        >>> features_fn = lambda params, batch: batch["inputs"]
        >>> loss_fn = lambda params, batch: jnp.mean((batch["inputs"] @ params["head"]["kernel"]) ** 2)
        >>> learner = jaxmaml.r2d2(loss_fn, features_fn)
        >>> meta_params = learner.init({"head": {"kernel": jnp.zeros((2, 2))}})
        >>> support = {"inputs": jnp.eye(2), "targets": jnp.array([0, 1])}
        >>> learner.adapt(meta_params, support)[0]["head"]["kernel"].round(2).tolist()
        [[0.5, 0.0], [0.0, 0.5]]
    """
    for name, value in (("ridge", ridge), ("scale", scale)):
        if not value > 0:
            raise ValueError(f"{name} must be positive; got {value!r}")

    def init(params: Params) -> dict[str, Array]:
        dtype = heads.get(params, head)["kernel"].dtype
        first = {"log_ridge": jnp.log(ridge), "log_scale": jnp.log(scale), "bias": 0.0}
        return {name: jnp.asarray(x, dtype) for name, x in first.items()}

    def fill(params: Params, learned: Mapping[str, Any], support: Batch) -> Params:
        values, number = learned["ridge"], heads.way_of(params, head, way)
        features = heads.features_of(features_fn, params, support)
        classes = heads.one_hot(support, number, features.dtype)
        # The square of each row counts with its weight, which is in the targets already.
        roots = heads.root_weights(support, features.dtype)
        targets = classes / jnp.where(roots > 0, roots, 1)
        kernel = ridge_regression(roots * features, targets, jnp.exp(values["log_ridge"]))
        has_bias = "bias" in heads.get(params, head)
        bias = jnp.full(number, values["bias"])
        bias = heads.without_absent(bias, classes) if has_bias else None
        return heads.fill(params, head, jnp.exp(values["log_scale"]) * kernel, bias)

    return head_filling(loss_fn, fill, init_learned={"ridge": init})


def ridge_regression(features: Array, targets: Array, ridge: Array | float) -> Array:
    """Returns the minimizer W of ||X W - Y||² + ridge ||W||².

    Args:
        features: X `[num_examples, num_features]`.
        targets: Y `[num_examples, num_outputs]`.
        ridge: positive scalar.

    Returns:
        `[num_features, num_outputs]`.

    Example:
        >>> import jax.numpy as jnp
        >>> weights = ridge_regression(jnp.array([[2.0]]), jnp.array([[1.0]]), 1.0)
        >>> round(float(weights[0, 0]), 4)
        0.4
    """
    # The factorization needs float32 at least, whatever the model computes in.
    dtype = jnp.promote_types(features.dtype, jnp.float32)
    features, targets = features.astype(dtype), targets.astype(dtype)
    gram = features @ features.T + ridge * jnp.eye(len(features), dtype=dtype)
    return features.T @ jax.scipy.linalg.solve(gram, targets, assume_a="pos")
