"""A gradient whose own derivative runs forward-over-reverse.

Differentiating through `jax.grad` in reverse mode stores the intermediate values of both its passes.
`value_and_grad` here stores its inputs only. Let L(x) be the loss, x all its arguments, p the one that
is differentiated, g = dL/dp. The cotangents (c_loss, c_g) of (L, g) pull back to

    c_loss * dL/dx + d/dx <dL/dp, c_g>,

and the second term is the directional derivative of dL/dx along (c_g, 0): one `jax.jvp` of `jax.grad`,
whose primal output is the first term's factor, so that both cost one pass (Kemaev et al. 2025,
arXiv 2505.00793, section 3). In an inner loop of n steps the memory is n times the parameters
instead of n times the activations.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

ADJOINTS = ("forward_over_reverse", "reverse", "checkpoint")
_FORWARD_MODE = (
    "forward-mode differentiation does not pass through adjoint='forward_over_reverse': either the "
    "adaptation itself is differentiated forward-mode (jvp, linearize, jacfwd), or the loss function "
    "has a custom_vjp that calls another custom_vjp; use adjoint='reverse'"
)


def value_and_grad(
    fun: Callable[..., Any], *, has_aux: bool = False, adjoint: str = "forward_over_reverse"
) -> Callable[..., Any]:
    """`jax.value_and_grad` for the first argument, with a choice of how it is differentiated itself.

    Every argument of `fun` and every value that it closes over may be differentiated through the
    result, not the first argument only: learned losses, learned hyper-parameters, example weights.
    Integer and PRNG-key arrays have no derivative.

    Args:
        fun: returns a scalar, or with `has_aux` a pair (scalar, aux). aux is never differentiated.
        has_aux: whether `fun` returns such a pair.
        adjoint: "forward_over_reverse" stores the inputs only; "reverse" is plain
            `jax.value_and_grad`; "checkpoint" is that under `jax.checkpoint`. All give the same
            derivatives. Forward mode from outside (`jax.jvp`, `jax.linearize` of the result) needs
            one of the latter two; forward mode over a reverse derivative of the result
            (`jax.hessian`) works in all three.

    Returns:
        A function of the arguments of `fun` that gives (value, gradient), or with `has_aux`
        ((value, aux), gradient).

    Raises:
        ValueError: an unknown adjoint.
        TypeError: `fun` returns no floating-point scalar, or cannot be differentiated this way.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxmaml import mixed_mode
        >>> loss = lambda w, rate: rate * jnp.sum(w**2)
        >>> def after_one_step(rate, w):
        ...     _, grad = mixed_mode.value_and_grad(loss)(w, rate)
        ...     return loss(w - 0.1 * grad, 1.0)
        >>> round(float(jax.grad(after_one_step)(1.0, jnp.array([1.0]))), 4)
        -0.32
    """
    check_adjoint(adjoint)
    scalar = _checked(fun, has_aux)
    if adjoint == "reverse":
        return jax.value_and_grad(scalar, has_aux=has_aux)
    if adjoint == "checkpoint":
        return jax.checkpoint(jax.value_and_grad(scalar, has_aux=has_aux))

    def apply(*args):
        hoisted, captured = _hoist(scalar, args)
        with explain_forward_mode():
            return _forward_over_reverse(hoisted, has_aux)((*args, captured))

    return apply


def check_adjoint(adjoint: str) -> None:
    """Raises ValueError for an adjoint that does not exist."""
    if adjoint not in ADJOINTS:
        raise ValueError(f"adjoint must be one of {', '.join(ADJOINTS)}; got {adjoint!r}")


def check_scalar(loss: Any) -> None:
    """Raises TypeError unless `loss` is a floating-point scalar."""
    if isinstance(loss, tuple):
        raise TypeError(
            "the loss function must return a scalar; got a tuple "
            "(a pair (loss, state) needs has_state=True)"
        )
    dtype, shape = jnp.result_type(loss), jnp.shape(loss)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            "the loss function must return a floating-point scalar, the mean over examples; "
            f"got {dtype}{list(shape)}"
        )


@contextlib.contextmanager
def explain_forward_mode() -> Iterator[None]:
    """Adds what to do to JAX's TypeError for forward mode over a custom_vjp."""
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(_FORWARD_MODE) from error


def _checked(fun: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    def checked(*args):
        out = fun(*args)
        if not has_aux:
            check_scalar(out)
            return out
        if not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError("has_state=True: the loss function must return a pair (loss, state)")
        check_scalar(out[0])
        return out[0], jax.lax.stop_gradient(out[1])

    return checked


def _hoist(fun: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Callable[..., Any], list[Any]]:
    """Turns the traced values that `fun` closes over into its last argument.

    `jax.closure_convert` leaves integers behind, which escape the trace they belong to when the
    backward pass runs outside of it.
    """
    jaxpr, out_shape = jax.make_jaxpr(fun, return_shape=True)(*args)
    out_tree = jax.tree.structure(out_shape)
    traced = [isinstance(const, Tracer) for const in jaxpr.consts]
    concrete = [None if t else const for t, const in zip(traced, jaxpr.consts, strict=True)]

    def hoisted(*args_and_captured):
        *args, captured = args_and_captured
        consts = merge_leaves(traced, captured, concrete)
        run = jaxpr_as_fun(ClosedJaxpr(jaxpr.jaxpr, consts))
        return jax.tree.unflatten(out_tree, run(*jax.tree.leaves(tuple(args))))

    return hoisted, select_leaves(traced, jaxpr.consts)


def _forward_over_reverse(fun: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    plain = jax.value_and_grad(fun, has_aux=has_aux)

    @jax.custom_vjp
    def apply(args):
        return plain(*args)

    def forward(args):
        return plain(*args), args

    def backward(args, cotangents):
        value_cotangent, grad_cotangent = cotangents
        loss_cotangent = value_cotangent[0] if has_aux else value_cotangent
        with explain_forward_mode():
            return (_pull_back(fun, has_aux, args, loss_cotangent, grad_cotangent),)

    apply.defvjp(forward, backward)
    return apply


def _pull_back(fun, has_aux, args, loss_cotangent, grad_cotangent):
    """c_loss * dL/dx + d/dx <dL/dp, c_g> for x = args, p = args[0]; float0 where x is no float."""
    params, *rest = args
    leaves, treedef = jax.tree.flatten(rest)
    is_float = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves]
    floats = select_leaves(is_float, leaves)

    def loss(params, floats):
        out = fun(params, *jax.tree.unflatten(treedef, merge_leaves(is_float, floats, leaves)))
        return out[0] if has_aux else out

    # Only the parameters have a tangent: those of the other arguments are zeros that JAX never makes.
    grad = lambda params: jax.grad(loss, argnums=(0, 1))(params, floats)
    first, second = jax.jvp(grad, (params,), (grad_cotangent,))
    pulled = jax.tree.map(lambda a, b: loss_cotangent.astype(a.dtype) * a + b, first, second)
    no_cotangent = [np.zeros(jnp.shape(leaf), jax.dtypes.float0) for leaf in leaves]
    return (
        pulled[0],
        *jax.tree.unflatten(treedef, merge_leaves(is_float, pulled[1], no_cotangent)),
    )


def select_leaves(choose: list[bool], leaves: list[Any]) -> list[Any]:
    """The entries of `leaves` that are marked in `choose`, in order: what `merge_leaves` puts back."""
    return [leaf for c, leaf in zip(choose, leaves, strict=True) if c]


def merge_leaves(choose: list[bool], chosen: list[Any], other: list[Any]) -> list[Any]:
    """`other` with the entries marked in `choose` replaced, in order, by `chosen`."""
    found = iter(chosen)
    return [next(found) if c else o for c, o in zip(choose, other, strict=True)]
