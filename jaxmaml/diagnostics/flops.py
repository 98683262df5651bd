"""Counting operations without running them."""

import math
from collections.abc import Callable
from typing import Any

import jax


def count_flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Returns the floating-point operations of the products and convolutions in one call.

    They are counted in the jaxpr. The body of a scan counts once per iteration (XLA's own
    `cost_analysis` counts it once). A multiplication and an addition are two operations. A `while`
    of unknown length counts once; of a `cond`, the most expensive branch counts.

    Args:
        function: any traceable function.
        args, kwargs: its arguments; `jax.ShapeDtypeStruct`s are enough.

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
    if name == "custom_linear_solve":  # its other programs are those of derivatives
        return _count(params["jaxprs"].solve.jaxpr)
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in params["branches"])
    inner = sum(_count(getattr(jaxpr, "jaxpr", jaxpr)) for jaxpr in _sub_jaxprs(params))
    return inner * params["length"] if name == "scan" else inner


def _sub_jaxprs(params: dict[str, Any]) -> list[Any]:
    values = jax.tree.leaves(list(params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
    return [value for value in values if hasattr(value, "eqns") or hasattr(value, "jaxpr")]
