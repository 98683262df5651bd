"""Arrays kept with their axes in another order while a traced function runs.

A model with channels first that is computed with channels last would be transposed before and after
each convolution. XLA CPU fuses these transpositions into the operations between them, which it then runs
as scalar code. Here a transposition is put off: an operation that treats all axes alike is applied to
the array as it is stored. `RULES` are these operations, for `jaxmaml.rewriting`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn, Primitive, primitives

from jaxmaml import rewriting
from jaxmaml.types import Array

Order = tuple[int, ...]
"""The axis of an array that is stored in each place."""


class Moved(NamedTuple):
    """An array whose axes are stored in another order.

    Attributes:
        stored: the array as it is stored.
        order: for each of its axes, the axis of the array that it stands for.
    """

    stored: Array
    order: Order


def moved(stored: Array, order: Sequence[int]) -> Moved | Array:
    """Returns the array that is stored in this order; a plain array if that is its own.

    Example:
        >>> moved(jnp.ones((5, 28, 28, 64)), (0, 2, 3, 1)).order
        (0, 2, 3, 1)
    """
    order = tuple(order)
    return stored if order == tuple(range(len(order))) else Moved(stored, order)


def settle(value: Any) -> Any:
    """Returns the array with its axes in their own order.

    Example:
        >>> settle(Moved(jnp.ones((5, 28, 28, 64)), (0, 2, 3, 1))).shape
        (5, 64, 28, 28)
    """
    if not isinstance(value, Moved):
        return value
    return lax.transpose(value.stored, _inverse(value.order))


def stored_in(value: Any, order: Order) -> Array:
    """Returns how an array is stored in some order.

    Example:
        >>> stored_in(jnp.ones((5, 64, 28, 28)), (0, 2, 3, 1)).shape
        (5, 28, 28, 64)
    """
    if isinstance(value, Moved) and value.order == order:
        return value.stored
    return lax.transpose(settle(value), order)


def order_of(value: Any) -> Order:
    """Returns the order in which an array is stored.

    Example:
        >>> order_of(jnp.ones((2, 3)))
        (0, 1)
    """
    return value.order if isinstance(value, Moved) else tuple(range(jnp.ndim(value)))


def permuted(values: Sequence[Any], order: Order) -> tuple[Any, ...]:
    """Returns what is given per axis, in the order of the stored axes.

    Example:
        >>> permuted(["n", "c", "h", "w"], (0, 2, 3, 1))
        ('n', 'h', 'w', 'c')
    """
    return tuple(values[axis] for axis in order)


def _inverse(order: Sequence[int]) -> Order:
    return tuple(np.argsort(order).tolist())


def _bind(eqn: JaxprEqn, operands: Sequence[Any], **changed: Any) -> list[Any]:
    params = eqn.primitive.get_bind_params({**eqn.params, **changed})
    outputs = eqn.primitive.bind(*operands, **params)
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def _common_order(operands: Sequence[Any]) -> Order | None:
    """Returns the order of the first operand that is moved; None without one."""
    return next((x.order for x in operands if isinstance(x, Moved)), None)


def _alike(eqn: JaxprEqn, *operands: Any) -> list[Any] | None:
    """An operation on each entry: all operands are stored in the order of the first that is moved."""
    order = _common_order(operands)
    if order is None:
        return None
    stored = [stored_in(x, order) if jnp.ndim(_array(x)) else x for x in operands]
    return [moved(output, order) for output in _bind(eqn, stored)]


def _array(value: Any) -> Any:
    return value.stored if isinstance(value, Moved) else value


def _transpose(eqn: JaxprEqn, inputs: Any) -> list[Any] | None:
    # Matrices and vectors are left alone.
    if len(eqn.params["permutation"]) < 3:
        return None
    places = _inverse(eqn.params["permutation"])
    return [moved(_array(inputs), permuted(places, order_of(inputs)))]


def _reduce(eqn: JaxprEqn, inputs: Any) -> list[Any] | None:
    if not isinstance(inputs, Moved):
        return None
    reduced = set(eqn.params["axes"])
    axes = tuple(place for place, axis in enumerate(inputs.order) if axis in reduced)
    (output,) = _bind(eqn, [inputs.stored], axes=axes)
    left = [axis for axis in inputs.order if axis not in reduced]
    return [moved(output, [sorted(left).index(axis) for axis in left])]


def _reshape(eqn: JaxprEqn, inputs: Any, *sizes: Any) -> list[Any] | None:
    """Axes of size 1 are inserted or dropped; those that stay are stored in the order that they had."""
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape  # pyright: ignore
    kept = [axis for axis, size in enumerate(before) if size != 1]
    new = [axis for axis, size in enumerate(after) if size != 1]
    same = [before[axis] for axis in kept] == [after[axis] for axis in new]
    # A reshape with dimensions transposes first; those of the other operations are what they drop.
    is_moved = eqn.primitive.name == "reshape" and eqn.params["dimensions"] is not None
    if not isinstance(inputs, Moved) or sizes or not same or is_moved:
        return None
    place = dict(zip(kept, new, strict=True))
    ones = [axis for axis, size in enumerate(after) if size == 1]
    order = [*ones, *(place[axis] for axis in inputs.order if axis in place)]
    return [moved(inputs.stored.reshape(permuted(after, tuple(order))), order)]


def _pad(eqn: JaxprEqn, inputs: Any, value: Any) -> list[Any] | None:
    if not isinstance(inputs, Moved):
        return None
    config = permuted(eqn.params["padding_config"], inputs.order)
    (output,) = _bind(eqn, [inputs.stored, value], padding_config=config)
    return [moved(output, inputs.order)]


def _slice(eqn: JaxprEqn, inputs: Any) -> list[Any] | None:
    if not isinstance(inputs, Moved):
        return None
    names = ("start_indices", "limit_indices", "strides")
    values = {name: eqn.params[name] for name in names}
    changed = {
        name: None if value is None else permuted(value, inputs.order)
        for name, value in values.items()
    }
    (output,) = _bind(eqn, [inputs.stored], **changed)
    return [moved(output, inputs.order)]


def _concatenate(eqn: JaxprEqn, *operands: Any) -> list[Any] | None:
    order = _common_order(operands)
    if order is None:
        return None
    place = order.index(eqn.params["dimension"])
    (output,) = _bind(eqn, [stored_in(x, order) for x in operands], dimension=place)
    return [moved(output, order)]


def _custom_jvp(eqn: JaxprEqn, *operands: Any) -> list[Any] | None:
    """A function with its own derivative, such as ReLU: both are computed on what is stored."""
    avals: list[Any] = [atom.aval for atom in eqn.invars]
    order = _common_order(operands)
    if order is None or not all(jnp.issubdtype(aval.dtype, jnp.floating) for aval in avals):
        return None

    # Arguments and results with as many axes as the moved one are stored as it is.
    def on_stored(jaxpr: Any, stored: Sequence[Array]) -> list[Array]:
        values = _evaluate(jaxpr, [_with_order(x, order) for x in stored])
        return [stored_in(x, _order_for(x, order)) for x in values]

    @jax.custom_jvp
    def call(*stored: Array) -> list[Array]:
        return on_stored(eqn.params["call_jaxpr"], stored)

    @call.defjvp
    def _(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> Any:
        shapes = tuple(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals)
        with_tangents = lambda x, t: jax.jvp(lambda *args: _bind(eqn, args), x, t)
        outputs = on_stored(jax.make_jaxpr(with_tangents)(shapes, shapes), [*primals, *tangents])
        return outputs[: len(eqn.outvars)], outputs[len(eqn.outvars) :]

    outputs = call(*(stored_in(x, _order_for(x, order)) for x in operands))
    return [_with_order(x, order) for x in outputs]


def _order_for(value: Any, order: Order) -> Order:
    own = order_of(value)
    return order if len(own) == len(order) else tuple(range(len(own)))


def _with_order(stored: Array, order: Order) -> Moved | Array:
    return moved(stored, _order_for(stored, order))


def _jit(eqn: JaxprEqn, *operands: Any) -> list[Any] | None:
    if _common_order(operands) is None:
        return None
    return _evaluate(eqn.params["jaxpr"], operands)


def _evaluate(jaxpr: Any, operands: Any) -> list[Any]:
    return rewriting.evaluate(jaxpr, rewriting.Rewriting({}, RULES, settle), list(operands))


_ALIKE = (
    "abs", "acos", "acosh", "add", "and", "asin", "asinh", "atan", "atan2", "atanh", "cbrt",
    "ceil", "clamp", "convert_element_type", "copy", "cos", "cosh", "digamma", "div", "eq",
    "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow",
    "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne",
    "neg", "nextafter", "not", "or", "pow", "reduce_precision", "rem", "round", "rsqrt",
    "select_n", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh",
    "xor",
)  # fmt: skip
_REDUCTIONS = ("reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum")


def _primitives(names: Sequence[str]) -> list[Primitive]:
    """The operations of these names that this version of JAX has."""
    found = (getattr(primitives, f"{name}_p", None) for name in names)
    return [primitive for primitive in found if primitive is not None]


RULES: dict[Primitive, Callable[..., list[Any] | None]] = {
    **dict.fromkeys(_primitives(_ALIKE), _alike),
    **dict.fromkeys(_primitives(_REDUCTIONS), _reduce),
    **dict.fromkeys(_primitives(["broadcast_in_dim", "reshape", "squeeze"]), _reshape),
    primitives.transpose_p: _transpose,
    primitives.pad_p: _pad,
    primitives.slice_p: _slice,
    primitives.concatenate_p: _concatenate,
    primitives.custom_jvp_call_p: _custom_jvp,
    primitives.jit_p: _jit,
}
"""The rules for operations on moved arrays. An operation without such an operand stays as it is."""
