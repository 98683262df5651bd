"""The linear head of a model: where it lies in the parameters, and what to put there.

A head is a mapping with "kernel" `[num_features, way]` and, in most models, "bias" `[way]`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmaml import inner
from jaxmaml.types import Array, Batch, Params

FeaturesFn = Callable[[Params, Batch], Array]
"""(params, batch) -> features [num_examples, num_features]: what the model's head is given."""


def under_path(head: str) -> Callable[[str], bool]:
    """A mask that is True at `head` and below it."""
    return lambda path: path == head or path.startswith(f"{head}/")


def beside_path(head: str) -> Callable[[str], bool]:
    """A mask that is False at `head` and below it."""
    return lambda path: not under_path(head)(path)


def check_path(params: Params, path: str) -> None:
    """Raises ValueError unless some parameters lie at `path`, and some beside it."""
    names = inner.leaf_paths(params)
    inside = [under_path(path)(name) for name in names]
    if any(inside) and not all(inside):
        return
    where = "everything lies" if any(inside) else "nothing lies"
    raise ValueError(f"{where} at {path!r}: the parameters are {', '.join(names)}")


def get(params: Params, head: str) -> Mapping[str, Array]:
    """The head at a path.

    Raises:
        ValueError: the path does not exist, or what lies there has no kernel.
    """
    found = params
    for name in head.split("/"):
        if not isinstance(found, Mapping) or name not in found:
            names = ", ".join(map(str, found)) if isinstance(found, Mapping) else "no names"
            raise ValueError(
                f"head={head!r} is no path of the parameters: beside {name!r} is {names}"
            )
        found = found[name]
    if not isinstance(found, Mapping) or "kernel" not in found:
        raise ValueError(f"head={head!r} must be a linear layer with a kernel [num_features, way]")
    return found


def fill(params: Params, head: str, kernel: Array, bias: Array | None) -> Params:
    """The parameters with another head; a `bias` of None is zero where the head has one.

    Raises:
        ValueError: the path does not exist, or there is a bias and the head has no place for it.
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
    """How many classes: `way`, or as many as the head has outputs."""
    return get(params, head)["kernel"].shape[-1] if way is None else way


def one_hot(batch: Batch, way: int, dtype: Any) -> Array:
    """`[num_examples, way]`: each example's class, padded examples in none.

    Raises:
        TypeError: the targets are no integers.
    """
    targets = jnp.asarray(batch["targets"])
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(f"targets must be integer class labels, got {targets.dtype}")
    classes = jax.nn.one_hot(targets, way, dtype=dtype)
    if "weights" not in batch:
        return classes
    return classes * jnp.asarray(batch["weights"], dtype)[:, None]


def prototypes(features: Array, batch: Batch, way: int) -> Array:
    """The mean feature of each class `[way, num_features]`, padded examples left out.

    Snell et al. 2017 (arXiv 1703.05175), equation 1. A class without examples has the prototype 0.
    """
    classes = one_hot(batch, way, features.dtype)
    counts = classes.sum(0)
    return (classes.T @ present(features, batch)) / jnp.where(counts > 0, counts, 1)[:, None]


def present(features: Array, batch: Batch) -> Array:
    """The features with zero rows for padded examples, whose own may be anything."""
    if "weights" not in batch:
        return features
    return jnp.where((jnp.asarray(batch["weights"]) > 0)[:, None], features, 0)


def _replaced(tree: Any, names: list[str], new: Any) -> Any:
    if not names:
        return new
    return {**tree, names[0]: _replaced(tree[names[0]], names[1:], new)}
