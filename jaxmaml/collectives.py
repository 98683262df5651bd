"""Sums over devices, and arrays that are split over them: the exchanges of an outer step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec

from jaxmaml import trees
from jaxmaml.types import Array

WHOLE = -1
"""In place of the number of a dimension: no dimension is split."""


def dims_of(specs: Any, axis_name: str) -> Any:
    """Returns the dimension that a mesh axis splits, or -1, for each `PartitionSpec` of a pytree.

    Example:
        >>> dims_of({"kernel": PartitionSpec(None, "tasks"), "bias": PartitionSpec()}, "tasks")
        {'bias': -1, 'kernel': 1}
    """

    def dim(spec: PartitionSpec) -> int:
        return next((i for i, name in enumerate(spec) if name == axis_name), WHOLE)

    return jax.tree.map(dim, specs, is_leaf=lambda value: isinstance(value, PartitionSpec))


class Axis(NamedTuple):
    """A mesh axis over which tasks are spread, inside `shard_map`.

    Attributes:
        name: the name of the axis.
        dims: which dimension of each parameter is split over it, see `dims_of`. None if every device
            has all parameters as a whole.

    Example:
        >>> Axis("tasks").dims is None
        True
    """

    name: str
    dims: Any = None

    def varying(self, tree: Any) -> Any:
        """Marks what all devices share as one copy each."""
        return jax.tree.map(lambda leaf: jax.lax.pcast(leaf, self.name, to="varying"), tree)

    def whole(self, params: Any) -> Any:
        """Returns parameters as a whole, of which each device has a part."""
        if self.dims is None:
            return params

        def gather(leaf: Array, dim: int) -> Array:
            if dim == WHOLE:
                return leaf
            return jax.lax.all_gather(leaf, self.name, axis=dim, tiled=True)

        return jax.tree.map(gather, params, self.dims)

    def total(self, tree: Any) -> Any:
        """Returns the sums over the devices, on every device, in one exchange."""
        if self.dims is None:
            return jax.lax.psum(tree, self.name)
        # In the two halves of an all-reduce, as the gradients that are split and gathered.
        flat, unravel = ravel_pytree(tree)
        padded = jnp.pad(flat, (0, -flat.size % jax.lax.axis_size(self.name)))
        part = jax.lax.psum_scatter(padded, self.name, tiled=True)
        return unravel(jax.lax.all_gather(part, self.name, tiled=True)[: flat.size])

    def total_with_grads(self, rest: Any, grads: Any) -> tuple[Any, Any]:
        """Returns the sums over the devices of some arrays, and of whole gradients.

        Of a gradient, each device gets the part that it has of the parameter.
        """
        if self.dims is None:
            return self.total((rest, grads))
        leaves, structure = jax.tree.flatten(grads)
        dims = jax.tree.leaves(self.dims)
        whole = [leaf for leaf, dim in zip(leaves, dims, strict=True) if dim == WHOLE]
        rest, whole = self.total((rest, whole))
        remaining = iter(whole)
        scatter = lambda leaf, dim: jax.lax.psum_scatter(
            leaf, self.name, scatter_dimension=dim, tiled=True
        )
        parts = [
            next(remaining) if dim == WHOLE else scatter(leaf, dim)
            for leaf, dim in zip(leaves, dims, strict=True)
        ]
        return rest, jax.tree.unflatten(structure, parts)

    def norm(self, grads: Any) -> Array:
        """Returns the norm over gradients that are split as the parameters are."""
        if self.dims is None:
            return trees.norm(grads)
        grads = trees.in_float32(grads)
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(self.dims), strict=True)
        parts: dict[bool, list[Array]] = {False: [], True: []}
        for leaf, dim in pairs:
            parts[dim == WHOLE].append(leaf)
        squares = {
            is_whole: optax.tree.norm(leaves, squared=True) for is_whole, leaves in parts.items()
        }
        return jnp.sqrt(self.total(squares[False]) + squares[True])

    def of_first_device(self, tree: Any, counts: Array) -> Any:
        """Returns counters and keys as the first device has them whose tasks count, on all devices.

        Without such leaves nothing is sent.
        """
        if not jax.tree.leaves(tree):
            return tree
        index, num_devices = jax.lax.axis_index(self.name), jax.lax.axis_size(self.name)
        first = jax.lax.pmin(jnp.where(counts, index, num_devices), self.name)

        def pick(leaf: Array) -> Array:
            is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            data = jax.random.key_data(leaf) if is_key else leaf
            sent = jax.lax.psum(jnp.where(index == first, data, jnp.zeros_like(data)), self.name)
            sent = sent.astype(data.dtype)
            if not is_key:
                return sent
            return jax.random.wrap_key_data(sent, impl=jax.random.key_impl(leaf))

        return jax.tree.map(pick, tree)
