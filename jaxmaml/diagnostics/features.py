"""The share of a layer's representation that the inner loop keeps.

Raghu et al. 2020 (arXiv 1909.09157, section 3.2) find that the convolutional layers of MAML hardly
change within a task while its head does: features are reused, not learned again.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmaml.types import Array, Batch, Params


def cka(x: Array, y: Array, *, weights: Array | None = None) -> Array:
    """Returns the linear centered kernel alignment of two sets of features of the same examples.

    ||Y^T X||² / (||X^T X|| ||Y^T Y||) in Frobenius norms, for X and Y of mean zero over the examples
    (Kornblith et al. 2019, arXiv 1905.00414, section 3). It does not change if either is rotated,
    scaled or moved. With fewer examples than features it is biased towards 1: compare values for the
    same number of examples.

    Args:
        x: `[num_examples, ...]`, the rest flattened.
        y: `[num_examples, ...]`; the number of features may differ.
        weights: `[num_examples]`, the weight of each example, 0 for padding. Defaults to equal
            weights.

    Returns:
        A scalar in 0..1, up to rounding, in float32 at least; NaN if all examples of either have the
        same features.

    Raises:
        ValueError: x, y and weights have different numbers of examples, or none.

    Example:
        >>> import jax.numpy as jnp
        >>> x, y = jnp.array([0.0, 1.0, 2.0]), jnp.array([[0.0], [0.0], [3.0]])
        >>> round(float(cka(x, y)), 4), round(float(cka(y, 5 - 2 * y)), 4)
        (0.75, 1.0)
    """
    _check_examples(x=x, y=y, weights=weights)
    weights = jnp.ones(jnp.shape(x)[0]) if weights is None else jnp.asarray(weights)
    return jnp.vdot(_gram(x, weights), _gram(y, weights), precision="highest")


def feature_reuse(
    features_fn: Callable[[Params, Batch], Any],
    params: Params,
    adapted: Params,
    batch: Batch,
    *,
    weights: Array | None = None,
) -> Any:
    """Returns the `cka` of each layer's features before and after adaptation: 1 if they are reused.

    Args:
        features_fn: `(params, batch) -> pytree` of features `[num_examples, ...]`, such as a dict of
            the outputs of each layer.
        params: the parameters before adaptation: the meta-parameters of MAML, or for any learner
            the result of `adapt` with `num_inner_steps=0`.
        adapted: the parameters after adaptation, the result of `learner.adapt`.
        batch: the examples, such as the query of one task.
        weights: see `cka`.

    Returns:
        A pytree like that of `features_fn`, with a scalar per layer.

    Raises:
        ValueError: features without an axis of examples.

    Example:
        >>> import jax.numpy as jnp
        >>> def features_fn(params, batch):
        ...     hidden = batch @ params["body"]
        ...     return {"body": hidden, "head": hidden @ params["head"]}
        >>> params = {"body": jnp.eye(2), "head": jnp.array([[1.0], [0.0]])}
        >>> adapted = params | {"head": jnp.array([[0.0], [1.0]])}
        >>> batch = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> reuse = feature_reuse(features_fn, params, adapted, batch)
        >>> {layer: round(float(value), 4) for layer, value in reuse.items()}
        {'body': 1.0, 'head': 0.0}
    """
    before, after = features_fn(params, batch), features_fn(adapted, batch)
    return jax.tree.map(lambda x, y: cka(x, y, weights=weights), before, after)


def _gram(features: Array, weights: Array) -> Array:
    """The examples' inner products `[num_examples, num_examples]`, centered and of norm 1."""
    values = jnp.asarray(features).reshape(weights.shape[0], -1)
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    counted = weights > 0
    # Relative to the first example: features that are all equal then give exactly 0.
    origin = values[jnp.argmax(counted)][None]
    values = jnp.where(counted[:, None], values - origin, 0)
    values = values - jnp.average(values, axis=0, weights=weights, keepdims=True)
    values = values * jnp.sqrt(weights.astype(values.dtype))[:, None]
    values = values / jnp.linalg.norm(values)
    gram = jnp.matmul(values, values.T, precision="highest")
    return gram / jnp.linalg.norm(gram)


def _check_examples(**arrays: Any) -> None:
    shapes = {name: jnp.shape(array) for name, array in arrays.items() if array is not None}
    numbers = {shape[:1] for shape in shapes.values()}
    if len(numbers) != 1 or numbers & {(), (0,)}:
        found = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(
            f"all must have the same, positive number of examples on the first axis; got {found}"
        )
    if len(shapes.get("weights", (0,))) != 1:
        raise ValueError(f"weights must be [num_examples]; got {list(shapes['weights'])}")
