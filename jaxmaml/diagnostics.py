"""Pure functions that look inside."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmaml.types import Array


def agreement(grads: Any, reference: Any) -> tuple[Array, Array]:
    """How far a gradient agrees with a reference, over the whole tree.

    Args:
        grads: pytree, such as the first-order meta-gradient.
        reference: pytree of the same structure, such as the exact one.

    Returns:
        (cosine of the angle between them, norm of `grads` over norm of `reference`).

    Example:
        >>> import jax.numpy as jnp
        >>> cosine, ratio = agreement({"w": jnp.array([3.0, 0.0])}, {"w": jnp.array([1.0, 0.0])})
        >>> float(cosine), float(ratio)
        (1.0, 3.0)
    """
    norm, reference_norm = optax.tree.norm(grads), optax.tree.norm(reference)
    product = jnp.asarray(optax.tree.vdot(grads, reference))
    return product / (norm * reference_norm), jnp.asarray(norm / reference_norm)


def count_flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Floating-point operations of the matrix products and convolutions in one call of `function`.

    Counted in the jaxpr, where a scan's body counts once for each of its iterations (XLA's own
    `cost_analysis` counts it once). A multiplication and an addition are two. A `while` whose number
    of iterations is not known counts once; of a `cond`, the most expensive branch counts.

    Args:
        function: any traceable function.
        args, kwargs: what it is called with; `jax.ShapeDtypeStruct`s will do.

    Example:
        >>> import jax.numpy as jnp
        >>> count_flops(lambda a, b: a @ b, jnp.ones((2, 3)), jnp.ones((3, 4)))
        48
    """
    return _count(jax.make_jaxpr(function)(*args, **kwargs).jaxpr)


def _count(jaxpr: Any) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        sizes = [equation.invars[0].aval.shape[axis] for axis in contracted]
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(sizes)
    if name == "conv_general_dilated":
        kernel, numbers = equation.invars[1].aval.shape, params["dimension_numbers"]
        per_output = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
        return 2 * math.prod(equation.outvars[0].aval.shape) * per_output
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in params["branches"])
    inner = sum(_count(getattr(jaxpr, "jaxpr", jaxpr)) for jaxpr in _sub_jaxprs(params))
    return inner * params["length"] if name == "scan" else inner


def _sub_jaxprs(params: dict[str, Any]) -> list[Any]:
    values = jax.tree.leaves(list(params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
    return [value for value in values if hasattr(value, "eqns") or hasattr(value, "jaxpr")]
