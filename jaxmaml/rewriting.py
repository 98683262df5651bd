"""Functions in which primitive operations, or the values that they close over, are replaced."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.core import Tracer
from jax.extend.core import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    Primitive,
    jaxpr_as_fun,
    primitives,
)

from jaxmaml import trees

Rule: TypeAlias = Callable[..., Any]
"""`(eqn, *operands) -> ` the outputs of the operation, as a sequence; None leaves it as it is."""
Rules: TypeAlias = Mapping[Primitive, Rule]
"""The rule of each primitive that is replaced."""


class Rewriting(NamedTuple):
    """The rules by which operations are replaced.

    Attributes:
        rules: the rule of each primitive. Operations that hold one of these are made anew.
        carried: rules of other primitives, for which nothing is made anew.
        settle: returns a value as an array. The values that rules return may be anything that the
            other rules take; operations without a rule, and the caller, get arrays.
    """

    rules: Rules
    carried: Rules
    settle: Callable[[Any], Any]


def rewrite(
    fun: Callable[..., Any],
    rules: Rules,
    *,
    only_with: Collection[Primitive] | None = None,
    carried: Rules | None = None,
    settle: Callable[[Any], Any] = lambda value: value,
) -> Callable[..., Any]:
    """Returns `fun` with some of its primitive operations replaced.

    The operations are also replaced inside `jit`, `checkpoint`, `scan`, `while_loop` and `cond`. What
    has a derivative rule of its own (`custom_jvp`, `custom_vjp`) is left as it is. A function without
    any such operation is called as it is.

    Args:
        fun: a function of pytrees of arrays that JAX can trace.
        rules: the rule of each primitive.
        only_with: a function without any of these primitives is called as it is. Defaults to those
            that have a rule.
        carried, settle: for rules that return something else than arrays; see `Rewriting`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax.extend.core import primitives
        >>> as_cosine = lambda eqn, x: [jnp.cos(x)]
        >>> float(rewrite(lambda x: 2 * jnp.sin(x), {primitives.sin_p: as_cosine})(0.0))
        2.0
    """

    rewriting = Rewriting(rules, carried or {}, settle)

    def rewritten(*args: Any) -> Any:
        jaxpr, shapes = jax.make_jaxpr(fun, return_shape=True)(*args)
        if not contains(jaxpr.jaxpr, rules if only_with is None else only_with):
            return fun(*args)
        outputs = evaluate(jaxpr, rewriting, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), map(settle, outputs))

    return rewritten


def hoist(
    fun: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[Jaxpr, Callable[..., Any], list[Any]]:
    """Turns the traced values that `fun` closes over into its last argument.

    `jax.closure_convert` leaves integers behind, which escape the trace that they belong to when the
    backward pass runs outside of it.

    Returns:
        The operations of `fun`, the new function `(*args, captured)`, and the values.

    Example:
        >>> import jax
        >>> def doubled(x):
        ...     jaxpr, hoisted, captured = hoist(lambda y: x * y, (3.0,))
        ...     return hoisted(3.0, [2 * value for value in captured])
        >>> float(jax.jit(doubled)(1.0))
        6.0
    """
    jaxpr, out_shape = jax.make_jaxpr(fun, return_shape=True)(*args)
    out_tree = jax.tree.structure(out_shape)
    is_traced = [isinstance(const, Tracer) for const in jaxpr.consts]
    captured, concrete = trees.partition(list(jaxpr.consts), is_traced)

    def hoisted(*args_and_captured: Any) -> Any:
        *args, captured = args_and_captured
        consts = trees.combine(captured, concrete)
        run = jaxpr_as_fun(ClosedJaxpr(jaxpr.jaxpr, consts))
        return jax.tree.unflatten(out_tree, run(*jax.tree.leaves(tuple(args))))

    return jaxpr.jaxpr, hoisted, captured


def contains(jaxpr: Jaxpr, wanted: Collection[Primitive]) -> bool:
    """Returns whether a jaxpr has one of some operations, where `rewrite` would replace it.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax.extend.core import primitives
        >>> jaxpr = jax.make_jaxpr(jax.jit(jnp.sin))(0.0).jaxpr
        >>> contains(jaxpr, [primitives.sin_p]), contains(jaxpr, [primitives.cos_p])
        (True, False)
    """
    return any(eqn.primitive in wanted or _is_rebuilt(eqn, wanted) for eqn in jaxpr.eqns)


def operations(jaxpr: Jaxpr, holder: str = "") -> Iterator[tuple[JaxprEqn, str]]:
    """Returns every operation of a jaxpr and of those that it holds.

    Args:
        jaxpr: a jaxpr.
        holder: the name that is given with its own operations.

    Returns:
        Pairs of an operation and the name of the outermost operation around it in which `rewrite`
        replaces nothing; "" if there is none.

    Example:
        >>> jaxpr = jax.make_jaxpr(jax.nn.relu)(0.0).jaxpr
        >>> [(str(eqn.primitive), holder) for eqn, holder in operations(jaxpr)][0]
        ('custom_jvp_call', '')
    """
    for eqn in jaxpr.eqns:
        yield eqn, holder
        inner = holder or ("" if eqn.primitive in _REBUILD else eqn.primitive.name)
        for held in _inside(eqn):
            yield from operations(held, inner)


def _is_rebuilt(eqn: JaxprEqn, wanted: Collection[Primitive]) -> bool:
    """Whether an operation holds some of the others."""
    return eqn.primitive in _REBUILD and any(contains(inner, wanted) for inner in _inside(eqn))


def _inside(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """The jaxprs among the parameters of an operation."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def evaluate(closed: ClosedJaxpr, rewriting: Rewriting, args: Sequence[Any]) -> list[Any]:
    """Returns the outputs of a jaxpr, one operation after the other.

    Args:
        closed: the jaxpr.
        rewriting: how its operations are replaced.
        args: its arguments: arrays, or what the rules take for them. So are the outputs.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax.extend.core import primitives
        >>> as_cosine = lambda eqn, x: [jnp.cos(x)]
        >>> rules = {primitives.sin_p: as_cosine}
        >>> rewriting = Rewriting(rules, {}, lambda value: value)
        >>> float(evaluate(jax.make_jaxpr(jnp.sin)(0.0), rewriting, [0.0])[0])
        1.0
    """
    jaxpr = closed.jaxpr
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))
    read = lambda atom: atom.val if isinstance(atom, Literal) else values[atom]
    for eqn in jaxpr.eqns:
        outputs = _operation(eqn, rewriting, [read(atom) for atom in eqn.invars])
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _operation(eqn: JaxprEqn, rewriting: Rewriting, operands: list[Any]) -> Sequence[Any]:
    settled = lambda: [rewriting.settle(operand) for operand in operands]
    if _is_rebuilt(eqn, rewriting.rules):
        is_inlined = eqn.primitive is primitives.jit_p
        return _REBUILD[eqn.primitive](eqn, rewriting, operands if is_inlined else settled())
    rule = rewriting.rules.get(eqn.primitive) or rewriting.carried.get(eqn.primitive)
    with eqn.ctx.manager:  # what the operation was traced under, such as a precision
        replaced = None if rule is None else rule(eqn, *operands)
        if replaced is not None:
            return replaced
        operands = settled()
        outputs = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return outputs if eqn.primitive.multiple_results else [outputs]


def _function(closed: ClosedJaxpr, rewriting: Rewriting, *before: Any) -> Callable[..., list[Any]]:
    """A jaxpr with its operations replaced, as a function of the arguments after `before`."""
    return lambda *args: list(map(rewriting.settle, evaluate(closed, rewriting, [*before, *args])))


def _jit(eqn: JaxprEqn, rewriting: Rewriting, operands: list[Any]) -> Sequence[Any]:
    return evaluate(eqn.params["jaxpr"], rewriting, operands)


def _checkpoint(eqn: JaxprEqn, rewriting: Rewriting, operands: list[Any]) -> Sequence[Any]:
    params = eqn.params
    function = _function(ClosedJaxpr(params["jaxpr"], ()), rewriting)
    return jax.checkpoint(
        function, policy=params["policy"], prevent_cse=params["prevent_cse"]
    )(*operands)  # fmt: skip


def _cond(eqn: JaxprEqn, rewriting: Rewriting, operands: list[Any]) -> Sequence[Any]:
    index, *rest = operands
    branches = [_function(branch, rewriting) for branch in eqn.params["branches"]]
    return jax.lax.switch(index, branches, *rest)


def _while(eqn: JaxprEqn, rewriting: Rewriting, operands: list[Any]) -> Sequence[Any]:
    params = eqn.params
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    for_cond, for_body = operands[:num_cond], operands[num_cond : num_cond + num_body]
    condition = _function(params["cond_jaxpr"], rewriting, *for_cond)
    body = _function(params["body_jaxpr"], rewriting, *for_body)
    return jax.lax.while_loop(
        lambda carry: condition(*carry)[0], lambda carry: body(*carry), operands[num_cond + num_body :]
    )  # fmt: skip


def _num_scanned(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    pairs = zip(outside, inside, strict=True)
    return sum(outer.aval.ndim > inner.aval.ndim for outer, inner in pairs)


def _scan(eqn: JaxprEqn, rewriting: Rewriting, operands: list[Any]) -> Sequence[Any]:
    # What is scanned has one axis more outside; JAX names the other numbers differently by version.
    params, inside = eqn.params, eqn.params["jaxpr"].jaxpr
    num_carry = len(eqn.outvars) - _num_scanned(eqn.outvars, inside.outvars)
    num_consts = len(operands) - num_carry - _num_scanned(eqn.invars, inside.invars)
    body = _function(params["jaxpr"], rewriting, *operands[:num_consts])

    def step(carry: list[Any], rows: list[Any]) -> tuple[list[Any], list[Any]]:
        outputs = body(*carry, *rows)
        return outputs[:num_carry], outputs[num_carry:]

    first, rows = operands[num_consts : num_consts + num_carry], operands[num_consts + num_carry :]
    last, outputs = jax.lax.scan(
        step, first, rows,
        length=params["length"], reverse=params["reverse"], unroll=params["unroll"],
    )  # fmt: skip
    return [*last, *outputs]


_REBUILD: dict[Primitive, Callable[[JaxprEqn, Rewriting, list[Any]], Sequence[Any]]] = {
    primitives.jit_p: _jit,
    primitives.remat_p: _checkpoint,
    primitives.cond_p: _cond,
    primitives.while_p: _while,
    primitives.scan_p: _scan,
}
"""The operations that hold others, made anew from what they hold."""
