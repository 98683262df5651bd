"""Pytrees: the paths of leaves, masks over them, and parts of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmaml.checks import check_count
from jaxmaml.types import Array, Mask, Params


def leaf_path(path: Any) -> str:
    """Returns the path of a leaf as masks, errors and reports write it.

    Args:
        path: a key path, as `jax.tree.leaves_with_path` gives it.

    Example:
        >>> [leaf_path(path) for path, _ in jax.tree.leaves_with_path({"conv": [{"kernel": 0.0}]})]
        ['conv/0/kernel']
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_paths(tree: Any) -> list[str]:
    """Returns the path of each leaf, in the order of `jax.tree.leaves`.

    Example:
        >>> leaf_paths({"head": {"kernel": 0.0, "bias": 1.0}})
        ['head/bias', 'head/kernel']
    """
    return [leaf_path(path) for path, _ in jax.tree.leaves_with_path(tree)]


def by_layer(tree: Any, depth: int | None = None) -> dict[str, list[Any]]:
    """Returns the leaves of each layer, under the path of the layer.

    Args:
        tree: any pytree, such as parameters or their gradient.
        depth: the number of components of a leaf's path that make its layer: 1 puts all of "conv"
            together. Defaults to all but the last, or the only one. A bare array is a layer called
            "".

    Raises:
        ValueError: the depth is below 1.

    Example:
        >>> params = {"conv": [{"kernel": 1.0, "bias": 2.0}, {"kernel": 3.0}], "scale": 4.0}
        >>> by_layer(params)
        {'conv/0': [2.0, 1.0], 'conv/1': [3.0], 'scale': [4.0]}
        >>> by_layer(params, depth=1)
        {'conv': [2.0, 1.0, 3.0], 'scale': [4.0]}
    """
    if depth is not None:
        check_count("depth", depth)
    layers: dict[str, list[Any]] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        length = max(len(path) - 1, 1) if depth is None else depth
        layers.setdefault(leaf_path(path[:length]), []).append(leaf)
    return layers


def is_masked(node: Any) -> bool:
    """Returns whether a node stands for a leaf that `partition` has left out."""
    return isinstance(node, optax.MaskedNode)


def partition(tree: Any, choose: list[bool]) -> tuple[Any, Any]:
    """Splits a pytree into two of the same shape: the chosen leaves, and the others.

    `optax.MaskedNode` stands in the place of a leaf that is in the other part.

    Args:
        tree: any pytree.
        choose: whether each leaf belongs to the first part, in the order of `jax.tree.leaves`.

    Example:
        >>> partition({"a": 1, "b": 2}, [True, False])
        ({'a': 1, 'b': MaskedNode()}, {'a': MaskedNode(), 'b': 2})
    """
    leaves, treedef = jax.tree.flatten(tree)
    pairs = list(zip(choose, leaves, strict=True))
    chosen = [leaf if chosen else optax.MaskedNode() for chosen, leaf in pairs]
    others = [optax.MaskedNode() if chosen else leaf for chosen, leaf in pairs]
    return treedef.unflatten(chosen), treedef.unflatten(others)


def combine(first: Any, second: Any) -> Any:
    """Puts together what `partition` has split.

    Example:
        >>> combine(*partition({"a": 1, "b": 2}, [True, False]))
        {'a': 1, 'b': 2}
    """
    return jax.tree.map(lambda a, b: b if is_masked(a) else a, first, second, is_leaf=is_masked)


def is_float(tree: Any) -> list[bool]:
    """Returns whether each leaf is floating-point or complex, in the order of `jax.tree.leaves`.

    Example:
        >>> is_float({"count": 3, "mean": 0.5})
        [False, True]
    """
    return [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in jax.tree.leaves(tree)]


def has_types_of(tree: Any, like: Any, *, shapes: bool = False) -> bool:
    """Returns whether two pytrees have the same structure and dtypes, and with `shapes` the same shapes.

    Example:
        >>> has_types_of({"a": 1.0}, {"a": 2.0}), has_types_of({"a": 1.0}, {"a": 2})
        (True, False)
    """
    leaves, structure = jax.tree.flatten(tree)
    like_leaves, like_structure = jax.tree.flatten(like)
    if structure != like_structure:
        return False
    pairs = list(zip(leaves, like_leaves, strict=True))
    same_types = all(jnp.result_type(one) == jnp.result_type(other) for one, other in pairs)
    return same_types and (not shapes or all(jnp.shape(a) == jnp.shape(b) for a, b in pairs))


def describe(leaf: Any) -> str:
    """Returns the dtype and shape of an array, for messages.

    Example:
        >>> describe(jnp.zeros((2, 3)))
        'float32[2,3]'
    """
    return f"{jnp.result_type(leaf)}[{','.join(map(str, jnp.shape(leaf)))}]"


def check_params(params: Params) -> None:
    """Raises unless a pytree has leaves, all of them real and floating-point.

    Args:
        params: parameters or meta-parameters.

    Raises:
        ValueError: the pytree has no leaves.
        TypeError: a leaf is of another type, such as integers. The message names its path.

    Example:
        >>> check_params({"scale": 1.0})
    """
    leaves = jax.tree.leaves_with_path(params)
    if not leaves:
        raise ValueError("the parameters are empty: there is nothing to learn")
    for path, leaf in leaves:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            where = f"at {leaf_path(path)!r} " if path else ""
            raise TypeError(
                f"parameters must be real and floating-point; {where}they are {dtype}. Constants "
                "belong into the loss, which may close over them, and counters into its state"
            )


def is_adapted(params: Params, mask: Mask) -> list[bool]:
    """Returns whether a mask marks each leaf of `params`, in the order of `jax.tree.leaves`.

    Args:
        params: the parameters.
        mask: a pytree of bools, a function of a leaf's path, or None for all leaves.

    Raises:
        ValueError: the mask matches no leaf, or its structure is not a prefix of that of the
            parameters.

    Example:
        >>> is_adapted({"body": 1.0, "head": 2.0}, lambda path: path == "head")
        [False, True]
    """
    if callable(mask):
        paths = leaf_paths(params)
        flags, hint = [bool(mask(path)) for path in paths], f"the parameters are {', '.join(paths)}"
    else:
        flags, hint = _broadcast(True if mask is None else mask, params), "it is False everywhere"
    if flags and not any(flags):
        raise ValueError(
            f"mask matches no parameter, so the inner loop has nothing to adapt; {hint}"
        )
    return flags


def under_path(path: str) -> Callable[[str], bool]:
    """Returns a mask that is True at a path and below it.

    Example:
        >>> under_path("head")("head/kernel"), under_path("head")("header")
        (True, False)
    """
    return lambda leaf: leaf == path or leaf.startswith(f"{path}/")


def beside_path(path: str) -> Callable[[str], bool]:
    """Returns a mask that is False at a path and below it."""
    return lambda leaf: not under_path(path)(leaf)


def _broadcast(mask: Mask, params: Params) -> list[bool]:
    """The flags of a pytree of bools that may be a prefix of the parameters."""
    try:
        full = jax.tree.map(lambda flag, sub: jax.tree.map(lambda _: bool(flag), sub), mask, params)
    except ValueError as error:
        raise ValueError(f"mask must have the structure of the parameters: {error}") from None
    return jax.tree.leaves(full)


def in_float32(tree: Any) -> Any:
    """Returns a pytree of numbers in float32; a leaf that has more digits stays as it is.

    Example:
        >>> import jax.numpy as jnp
        >>> in_float32({"w": jnp.zeros(2, jnp.bfloat16)})["w"].dtype
        dtype('float32')
    """
    wide = lambda leaf: jnp.promote_types(jnp.result_type(leaf), jnp.float32)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, wide(leaf)), tree)


def norm(tree: Any) -> Array:
    """Returns the Euclidean norm of all numbers of a pytree, in float32 or higher.

    In float16 the square of a number above 255 is infinite.

    Example:
        >>> import jax.numpy as jnp
        >>> norm({"w": jnp.array([300.0, 400.0], jnp.float16)}).item()
        500.0
    """
    return optax.tree.norm(in_float32(tree))
