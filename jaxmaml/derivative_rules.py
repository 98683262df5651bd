"""Derivative rules that users write, which need not be the derivative of their function."""

from pathlib import Path
from typing import Any

import jax
from jax.extend.core import Jaxpr

from jaxmaml import rewriting

_TRUSTED = (Path(jax.__file__).parent / "_src", Path(__file__).parent)
"""Where the rules of JAX and of this package lie; they are the derivatives of their functions."""
_FROM_USERS = ("custom_derivatives.py", "solves.py")
"""The files of JAX whose functions take a rule from their caller: custom_gradient, custom_root."""
_WITH_RULES = ("custom_jvp_call", "custom_vjp_call", "linear_call", "custom_transpose_call")


def of_users(jaxpr: Jaxpr) -> list[str]:
    """Returns the functions in a jaxpr whose derivative rule is not one of JAX or of this package.

    Such a rule may be anything: a reversed or clipped gradient, a straight-through estimator. The
    gradient that it gives is then not the gradient of a function, and its Jacobian not symmetric.

    Args:
        jaxpr: what was traced, before it is differentiated.

    Returns:
        The names and places of the functions, each once.

    Example:
        >>> reverse = jax.custom_vjp(lambda x: x)
        >>> reverse.defvjp(lambda x: (x, None), lambda _, cotangent: (-cotangent,))
        >>> [found] = of_users(jax.make_jaxpr(lambda x: reverse(jax.nn.relu(x)))(1.0).jaxpr)
        >>> found.startswith("<lambda> at ")
        True
    """
    found = [
        _described(eqn.params)
        for eqn, _ in rewriting.operations(jaxpr)
        if eqn.primitive.name in _WITH_RULES
    ]
    return list(dict.fromkeys(name for name in found if not _is_trusted(name)))


def _described(params: dict[str, Any]) -> str:
    """The name and the place of the function that has a rule, as JAX's errors write it."""
    held = params.get("call_jaxpr") or params.get("callee")
    info = getattr(getattr(held, "jaxpr", held), "debug_info", None)
    return getattr(info, "func_src_info", None) or "a function of unknown origin"


def _is_trusted(described: str) -> bool:
    path = Path(described.partition(" at ")[2].rpartition(":")[0])
    return path.name not in _FROM_USERS and any(path.is_relative_to(root) for root in _TRUSTED)
