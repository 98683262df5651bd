"""What a layer of a pytree is called, and which leaves belong to it."""

from typing import Any

import jax


def leaf_name(path: Any) -> str:
    """A leaf's path as masks and reports write it.

    Example:
        >>> [leaf_name(path) for path, _ in jax.tree.leaves_with_path({"conv": [{"kernel": 0.0}]})]
        ['conv/0/kernel']
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_layer(tree: Any, depth: int | None = None) -> dict[str, list[Any]]:
    """The leaves of each layer, under the layer's path.

    Args:
        tree: any pytree, such as parameters or their gradient.
        depth: how many components of a leaf's path make its layer: 1 puts all of "conv" together.
            None takes all but the last, or the only one there is. A bare array is a layer called "".

    Raises:
        ValueError: a depth that is no positive integer.

    Example:
        >>> params = {"conv": [{"kernel": 1.0, "bias": 2.0}, {"kernel": 3.0}], "scale": 4.0}
        >>> by_layer(params)
        {'conv/0': [2.0, 1.0], 'conv/1': [3.0], 'scale': [4.0]}
        >>> by_layer(params, depth=1)
        {'conv': [2.0, 1.0, 3.0], 'scale': [4.0]}
    """
    is_int = isinstance(depth, int) and not isinstance(depth, bool)
    if depth is not None and (not is_int or depth < 1):
        raise ValueError(f"depth must be None or a positive integer; got {depth!r}")
    layers: dict[str, list[Any]] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        length = max(len(path) - 1, 1) if depth is None else depth
        layers.setdefault(leaf_name(path[:length]), []).append(leaf)
    return layers
