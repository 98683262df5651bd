"""R2-D2: Bertinetto et al. 2019 (arXiv 1805.08136), ridge regression as the head."""

import jax
import jax.numpy as jnp

from jaxmaml.learners import heads
from jaxmaml.learners.head_filling import head_filling
from jaxmaml.learners.inner_loop import learned
from jaxmaml.types import Array, Batch, Extended, LossFn, MetaLearner, MetaParams, Params


def r2d2(
    loss_fn: LossFn,
    features_fn: heads.FeaturesFn,
    *,
    head: str = "head",
    way: int | None = None,
    ridge: float = 1.0,
    scale: float = 1.0,
) -> MetaLearner:
    """Solves ridge regression from the support's features to one-hot targets, in closed form.

    W = Xᵀ (X Xᵀ + l I)⁻¹ Y (equation 4 of the paper, by Woodbury's identity: a system of the size of
    the support), logits = a X' W + b (equation 6) with l, a and b meta-learned; l = exp(.), so that
    it stays positive. Meta-parameters: `Extended(params, {"ridge": {"log_ridge", "log_scale",
    "bias"}})`; the initial head in `params` is not used.

    Args:
        loss_fn: cross-entropy of the whole model, `(params, batch) -> loss`.
        features_fn: `(params, batch) -> [num_examples, num_features]`, what the head is given.
        head: path of the head, a mapping with "kernel" and perhaps "bias".
        way: number of classes, where it is not that of the head: any will do.
        ridge: the initial l, positive, in units of the squared norm of an example's features.
        scale: the initial a, positive.

    Raises:
        ValueError: `ridge` or `scale` is not positive; when called, if `head` is no linear layer, or
            for another learner's parameters.
    """
    for name, value in (("ridge", ridge), ("scale", scale)):
        if not value > 0:
            raise ValueError(f"{name} must be positive; got {value!r}")

    def init(params: Params) -> Extended:
        dtype = heads.get(params, head)["kernel"].dtype
        first = {"log_ridge": jnp.log(ridge), "log_scale": jnp.log(scale), "bias": 0.0}
        return Extended(
            params, {"ridge": {name: jnp.asarray(x, dtype) for name, x in first.items()}}
        )

    def fill(meta_params: MetaParams, support: Batch) -> Params:
        params, values = learned(meta_params, "ridge")
        number = heads.way_of(params, head, way)
        features = heads.present(features_fn(params, support), support)
        targets = heads.one_hot(support, number, features.dtype)
        kernel = ridge_regression(features, targets, jnp.exp(values["log_ridge"]))
        has_bias = "bias" in heads.get(params, head)
        bias = jnp.full(number, values["bias"]) if has_bias else None
        return heads.fill(params, head, jnp.exp(values["log_scale"]) * kernel, bias)

    return head_filling(loss_fn, fill, init=init)


def ridge_regression(features: Array, targets: Array, ridge: Array | float) -> Array:
    """The minimiser W of ||X W - Y||² + ridge ||W||².

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
    # Factorising needs float32 at least, whatever the model computes in.
    dtype = jnp.promote_types(features.dtype, jnp.float32)
    features, targets = features.astype(dtype), targets.astype(dtype)
    gram = features @ features.T + ridge * jnp.eye(len(features), dtype=dtype)
    return features.T @ jax.scipy.linalg.solve(gram, targets, assume_a="pos")
