"""The linear head of a model: finding it in the parameters, and filling it in.

A head is a mapping with "kernel" `[num_features, way]` and, in most models, "bias" `[way]`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmaml.checks import check_integer_classes, checked_weights, zero_where_class
from jaxmaml.padding import blank_padding
from jaxmaml.types import Array, Batch, Params

FeaturesFn = Callable[[Params, Batch], Array]
"""`(params, batch) -> features [num_examples, num_features]`, the input of the head."""


def get(params: Params, head: str) -> Mapping[str, Array]:
    """Returns the head at a path.

    Raises:
        ValueError: the path does not exist, or no kernel lies there.
    """
    found = params
    for name in head.split("/"):
        if not isinstance(found, Mapping) or _key(found, name) is None:
            names = ", ".join(map(str, found)) if isinstance(found, Mapping) else "no names"
            raise ValueError(
                f"head={head!r} is not a path of the parameters: in place of {name!r} there is {names}"
            )
        found = found[_key(found, name)]
    if not isinstance(found, Mapping) or "kernel" not in found:
        raise ValueError(f"head={head!r} must be a linear layer with a kernel [num_features, way]")
    return found


def fill(params: Params, head: str, kernel: Array, bias: Array | None) -> Params:
    """Returns the parameters with another head; a `bias` of None fills in zeros if the head has one.

    Raises:
        ValueError: the path does not exist, or a bias is given and the head has none.
    """
    old = get(params, head)
    new = {**old, "kernel": kernel.astype(old["kernel"].dtype)}
    if "bias" in old:
        bias = jnp.zeros(kernel.shape[-1]) if bias is None else bias
        new["bias"] = bias.astype(old["bias"].dtype)
    elif bias is not None:
        raise ValueError(f"head={head!r} has no bias, which this learner fills in")
    return _replaced(params, head.split("/"), new)


def way_of(params: Params, head: str, way: int | None) -> int:
    """Returns the number of classes: `way`, or the number of outputs of the head."""
    return get(params, head)["kernel"].shape[-1] if way is None else way


def one_hot(batch: Batch, way: int, dtype: Any, name: str = "targets") -> Array:
    """Returns the class of each example as `[num_examples, way]`; rows of padded examples are zero.

    A target or a weight that is wrong and traced makes its row NaN.

    Raises:
        TypeError: the targets, `batch[name]`, are not integers.
        ValueError: targets or weights are not `[num_examples]`; a target is outside of 0..way-1 or a
            weight is negative, unless they are traced.
    """
    targets = jnp.asarray(batch[name])
    check_integer_classes(targets, name)
    if targets.ndim != 1:
        raise ValueError(f"{name} must be [num_examples], got shape {targets.shape}")
    weights, zero = checked_weights(
        batch.get("weights", jnp.ones(len(targets))), len(targets), dtype
    )
    targets = jnp.where(weights > 0, targets, 0) if "weights" in batch else targets
    zero = zero + zero_where_class(targets, way, dtype, name)
    # `one_hot` counts the classes in the type of the targets: 256 of them are too many for uint8.
    rows = jax.nn.one_hot(targets.astype(jnp.int32), way, dtype=dtype)
    return rows * weights[:, None] + zero[:, None]


def prototypes(features: Array, classes: Array) -> Array:
    """Returns the mean feature of each class, `[way, num_features]`, without padded examples.

    Snell et al. 2017 (arXiv 1703.05175), equation 1. A class without examples has the prototype 0.

    Args:
        features: those of `features_of`.
        classes: those of `one_hot`.
    """
    counts = classes.sum(0)
    return (classes.T @ features) / jnp.where(counts > 0, counts, 1)[:, None]


def without_absent(bias: Array, classes: Array) -> Array:
    """Returns the bias of a head in which a class without examples has the probability 0.

    Such a class is not one of the task: half of the lowest number leaves it out of a softmax.

    Args:
        bias: `[way]`.
        classes: those of `one_hot`.

    Example:
        >>> import jax.numpy as jnp
        >>> classes = one_hot({"targets": jnp.array([0, 2])}, 3, jnp.float32)
        >>> (without_absent(jnp.zeros(3), classes) < -1e38).tolist()
        [False, True, False]
    """
    return jnp.where(classes.sum(0) == 0, jnp.finfo(bias.dtype).min / 2, bias)


def features_of(features_fn: FeaturesFn, params: Params, batch: Batch) -> Array:
    """Returns the features of a batch, with zero rows for padded examples.

    These may hold anything: their inputs are zeros for `features_fn`, since a NaN would come back in
    the derivative.
    """
    if "weights" not in batch:
        return features_fn(params, batch)
    if "inputs" in batch:
        batch = {**batch, "inputs": blank_padding(batch["inputs"], batch["weights"])}
    return blank_padding(features_fn(params, batch), batch["weights"])


def root_weights(batch: Batch, dtype: Any) -> Array:
    """Returns the square roots of the weights, `[num_examples, 1]`; zero for padded examples.

    A weighted sum of squares is that of rows times these. Without weights they are ones.
    """
    if "weights" not in batch:
        return jnp.ones((len(batch["targets"]), 1), dtype)
    weights = jnp.asarray(batch["weights"], dtype)[:, None]
    # The root has no derivative at zero.
    return jnp.where(weights > 0, jnp.sqrt(jnp.where(weights > 0, weights, 1)), 0)


def prototype_head(
    features_fn: FeaturesFn, head: str, way: int | None
) -> Callable[[Params, Batch], Params]:
    """Returns `(params, support) -> params` whose head measures the distance to the class means."""

    def fill_in(params: Params, support: Batch) -> Params:
        features = features_of(features_fn, params, support)
        classes = one_hot(support, way_of(params, head, way), features.dtype)
        means = prototypes(features, classes)
        return fill(params, head, 2 * means.T, without_absent(-(means**2).sum(-1), classes))

    return fill_in


def _replaced(tree: Any, names: list[str], new: Any) -> Any:
    if not names:
        return new
    key = _key(tree, names[0])
    return {**tree, key: _replaced(tree[key], names[1:], new)}


def _key(tree: Mapping[Any, Any], name: str) -> Any:
    """Returns the key that a path writes as `name`, such as the integer of a list of layers, or None."""
    return next((key for key in tree if str(key) == name), None)
