"""A gradient whose own derivative runs forward-over-reverse.

Differentiating through `jax.grad` in reverse mode stores the intermediate values of both its passes.
`value_and_grad` here stores its inputs only. Let L(x) be the loss, x all its arguments, p the one that
is differentiated, and g = dL/dp. The cotangents (c_loss, c_g) of (L, g) pull back to

    c_loss * dL/dx + d/dx <dL/dp, c_g>.

The second term is the directional derivative of dL/dx along (c_g, 0): one `jax.jvp` of `jax.grad`. Its
primal output is the factor of the first term, so that one pass gives both (Kemaev et al. 2025,
arXiv 2505.00793, section 3). The memory of an inner loop of n steps is n times the parameters instead
of n times the activations.

Reverse mode multiplies by the transpose of the Jacobian of dL/dx, and the directional derivative by the
Jacobian itself. Both are the same because the Hessian is symmetric. A derivative rule that is not the
derivative of its function, such as a reversed gradient, breaks that: see `derivative_rules`.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxmaml import derivative_rules, rewriting, trees
from jaxmaml.checks import check_choice
from jaxmaml.types import Array

Mode: TypeAlias = Literal["forward_over_reverse", "reverse", "checkpoint"]
"""The way in which a gradient is differentiated itself; see `value_and_grad`."""

_FORWARD_MODE = (
    "forward-mode differentiation (jvp, linearize, jacfwd) does not pass through "
    "Exact(mode='forward_over_reverse') or a custom_vjp; use Exact(mode='reverse')"
)


def value_and_grad(
    fun: Callable[..., Any], *, has_aux: bool = False, mode: Mode = "forward_over_reverse"
) -> Callable[..., Any]:
    """Returns `jax.value_and_grad(fun)`, with a choice of how the result is differentiated.

    The result can be differentiated with respect to every argument of `fun` and every value that
    `fun` closes over, not the first argument only: learned losses, learned hyperparameters, weights
    of examples. Integer and PRNG-key arrays have no derivative.

    Args:
        fun: returns a scalar, or with `has_aux` a pair (scalar, aux). aux is never differentiated.
        has_aux: whether `fun` returns such a pair.
        mode: "forward_over_reverse" stores the inputs only. "reverse" is plain
            `jax.value_and_grad`. "checkpoint" is the same under `jax.checkpoint`. All three give the
            same derivatives: a function with derivative rules that a user wrote (`jax.custom_jvp`,
            `jax.custom_vjp`) is always differentiated as by "checkpoint", which stores the inputs
            only, too. Forward mode from outside (`jax.jvp` or `jax.linearize` of the result)
            needs "reverse" or "checkpoint"; forward mode over a reverse-mode derivative of the
            result (`jax.hessian`) works with all three.

    Returns:
        A function of the arguments of `fun` that returns (value, gradient), or with `has_aux`
        ((value, aux), gradient).

    Raises:
        ValueError: the mode is unknown.
        TypeError: when called, `fun` does not return a floating-point scalar, or cannot be
            differentiated in this mode.

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
    check_choice("mode", mode, get_args(Mode))
    scalar = _checked(fun, has_aux)
    if mode == "reverse":
        return jax.value_and_grad(scalar, has_aux=has_aux)
    recomputed = jax.checkpoint(jax.value_and_grad(scalar, has_aux=has_aux))
    if mode == "checkpoint":
        return recomputed

    def apply(*args: Any) -> Any:
        jaxpr, hoisted, captured = rewriting.hoist(scalar, args)
        if derivative_rules.of_users(jaxpr):
            return recomputed(*args)
        with explain_forward_mode():
            return _forward_over_reverse(hoisted, has_aux)((*args, captured))

    return apply


def check_scalar(loss: Any) -> None:
    """Raises TypeError unless a loss is a floating-point scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> check_scalar(jnp.float32(0.5))
    """
    if isinstance(loss, tuple):
        raise TypeError(
            "the loss function must return a scalar; got a tuple "
            "(mark a loss that returns (loss, state) with jaxmaml.with_state)"
        )
    dtype, shape = jnp.result_type(loss), jnp.shape(loss)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            "the loss function must return a floating-point scalar, the mean over examples; "
            f"got {dtype}{list(shape)}"
        )


@contextlib.contextmanager
def explain_forward_mode() -> Iterator[None]:
    """Adds the remedy to JAX's TypeError about forward mode over a custom_vjp.

    Raises:
        TypeError: in place of JAX's own, with a text that says what to change.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> square = jax.custom_vjp(lambda x: x**2)
        >>> square.defvjp(lambda x: (x**2, x), lambda x, cotangent: (2 * x * cotangent,))
        >>> try:
        ...     with explain_forward_mode():
        ...         jax.jvp(square, (1.0,), (1.0,))
        ... except TypeError as error:
        ...     print("use Exact(mode='reverse')" in str(error))
        True
    """
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(_FORWARD_MODE) from error


def _checked(fun: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """`fun` with its result checked, and aux outside of the derivative."""

    def checked(*args: Any) -> Any:
        out = fun(*args)
        if not has_aux:
            check_scalar(out)
            return out
        if not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(
                "a function with an auxiliary output, such as a loss that jaxmaml.with_state marks, "
                f"must return a pair (loss, aux); got {type(out).__name__}"
            )
        check_scalar(out[0])
        return out[0], jax.lax.stop_gradient(out[1])

    return checked


def _forward_over_reverse(fun: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    plain = jax.value_and_grad(fun, has_aux=has_aux)

    @jax.custom_vjp
    def apply(args: tuple[Any, ...]) -> Any:
        return plain(*args)

    def forward(args: tuple[Any, ...]) -> Any:
        values = jax.tree.map(lambda leaf: leaf.value, args)
        return plain(*values), values

    def backward(args: tuple[Any, ...], cotangents: Any) -> Any:
        value_cotangent, grad_cotangent = cotangents
        loss_cotangent = value_cotangent[0] if has_aux else value_cotangent
        loss_fn = (lambda *args: fun(*args)[0]) if has_aux else fun
        with explain_forward_mode():
            return (_pull_back(loss_fn, args, loss_cotangent, grad_cotangent),)

    apply.defvjp(forward, backward, symbolic_zeros=True)
    return apply


def _is_zero(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.SymbolicZero)


def _pull_back(
    loss_fn: Callable[..., Array], args: tuple[Any, ...], loss_cotangent: Any, grad_cotangent: Any
) -> tuple[Any, ...]:
    """c_loss * dL/dx + d/dx <dL/dp, c_g> for x = args, p = args[0]; float0 for integers and keys."""
    # Arguments without a derivative are set aside.
    params, *rest = args
    is_float = trees.is_float(rest)
    floats, others = trees.partition(rest, is_float)

    # One jvp of the gradient with respect to all floating-point arguments. Only the parameters have
    # a tangent: the tangents of the other arguments are zeros that JAX never materializes.
    loss = lambda params, floats: loss_fn(params, *trees.combine(floats, others))
    grad = lambda params: jax.grad(loss, argnums=(0, 1))(params, floats)
    dense = lambda p, c: jnp.zeros_like(p) if _is_zero(c) else c
    tangent = jax.tree.map(dense, params, grad_cotangent)
    first, pulled = jax.jvp(grad, (params,), (tangent,))

    # Nothing depends on the losses of an inner loop but their report: then dL/dx, as large as the
    # arguments, is not computed. A cotangent that is an array of zeros would not tell XLA that.
    if not _is_zero(loss_cotangent):
        scale = lambda a, b: loss_cotangent.astype(a.dtype) * a + b
        pulled = jax.tree.map(scale, first, pulled)

    no_cotangent = jax.tree.map(lambda leaf: np.zeros(jnp.shape(leaf), jax.dtypes.float0), others)
    return pulled[0], *trees.combine(pulled[1], no_cotangent)
