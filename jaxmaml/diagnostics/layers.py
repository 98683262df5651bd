"""The layers of a pytree of parameters, and the leaves of each."""

from typing import Any

import jax

from jaxmaml.checks import check_count
from jaxmaml.trees import leaf_path


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
