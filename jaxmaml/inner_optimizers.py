"""Any optax optimizer as the optimizer of an inner loop: differentiated, or refused.

Three things go wrong if an optimizer that was written for training is differentiated as it is:

- Its derivative is NaN where it takes the root of zero, or a quotient by zero that a condition then
  leaves out: Adam, clipping by a norm, LAMB and others, wherever an inner gradient is exactly zero.
  `update` gives these operations the derivative zero there. That is right for the root of a sum or an
  average of squares, and for a branch that is not taken. The updates themselves do not change.
- It needs more than the gradient, as line searches need the loss function. `update` passes it.
- Its parameters between two updates are not those to use (`schedule_free`, `lookahead`), or it needs
  what an inner loop does not have. `init` refuses these by the type of their state.

| optax optimizer | as an inner optimizer |
|---|---|
| every one that is not named below | differentiated exactly |
| `scale_by_zoom_linesearch`, `lbfgs` with its line search | runs; `Implicit()` alone differentiates it |
| `schedule_free*`, `lookahead`, `sam`, `sophia`, `monitor` | refused |
| `galore` | exact; NaN where the gradient of a matrix is zero, which has no singular vectors |
| `dpsgd`, `differentially_private_aggregate` | refused: they need one gradient per example |
| `inject_hyperparams` with bfloat16 or float16 values | refused: pass `hyperparam_dtype=jnp.float32` |

Adam's exact derivative at a gradient of zero is minus the learning rate divided by `eps`, a large
number: the update jumps from lr to -lr within a few `eps`. It matters where the gradient is zero at
the first step only, as under a head of zeros, and an `eps_root` makes it smaller. A parameter whose
gradient is always zero has no part in it. An `eps_root` is not neutral: in five steps at a rate of
0.01 on a small tanh network, 1e-8 moved the exact meta-gradient by 15 %, 1e-12 by 3e-5 and 1e-16 by
3e-9 (`test_what_an_eps_root_costs`). Use the smallest value that serves.
LAMB, LARS and `scale_by_trust_ratio` are not continuous at all where the update of an array is zero;
their derivative there is that of the branch that optax takes, a ratio of one.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import JaxprEqn, Literal, Primitive, primitives

from jaxmaml import rewriting, trees
from jaxmaml.types import Array, Params

OptState = optax.OptState


def init(optimizer: optax.GradientTransformation, params: Params) -> OptState:
    """Returns the state of an inner optimizer before the first step.

    Raises:
        ValueError: the optimizer cannot be used in an inner loop. The message says why and what to do.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> int(init(optax.adam(0.1), jnp.zeros(3))[0].count)
        0
    """
    opt_state = _safe(optimizer.init)(params)
    refused = _refused()
    for part in _parts(opt_state):
        reason = refused[type(part)](part) if type(part) in refused else ""
        if reason:
            raise ValueError(f"the inner optimizer cannot be used: {reason}")
    return opt_state


def update(
    optimizer: optax.GradientTransformationExtraArgs,
    grads: Params,
    opt_state: OptState,
    params: Params,
    loss: Array,
    loss_fn: Callable[[Params], Array],
) -> tuple[Params, OptState]:
    """Returns (updates, state) of one step of an inner optimizer.

    Args:
        optimizer: any optimizer that `init` accepts.
        grads: the gradient, like `params`.
        opt_state: its state.
        params: the parameters that are adapted.
        loss: their loss.
        loss_fn: `(params) -> loss`, for optimizers that evaluate it.

    Raises:
        ValueError: the optimizer changes the structure or the types of its state.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> def updated(grad):
        ...     clip = optax.with_extra_args_support(optax.clip_by_global_norm(1.0))
        ...     return update(clip, grad, clip.init(grad), grad, 0.0, jnp.sum)[0]
        >>> float(jax.grad(updated)(0.0))
        1.0
    """

    def call(grads: Params, opt_state: OptState, params: Params, loss: Array) -> Any:
        return optimizer.update(grads, opt_state, params, value=loss, grad=grads, value_fn=loss_fn)

    updates, next_state = _safe(call)(grads, opt_state, params, loss)
    _check_state(opt_state, next_state)
    if any(isinstance(part, optax.ScaleByZoomLinesearchState) for part in _parts(next_state)):
        updates = _without_derivative(updates)
    return updates, next_state


def _check_state(before: OptState, after: OptState) -> None:
    """Raises ValueError unless an optimizer keeps the structure and types of its state."""
    if not trees.has_types_of(after, before):
        kinds = [jax.tree.map(jnp.result_type, state) for state in (before, after)]
        raise ValueError(
            "the inner optimizer changes the structure of its state or its types, as optax.monitor "
            f"does: from {kinds[0]} to {kinds[1]}; leave it out, and look inside with jaxmaml.trace"
        )


def _safe(fun: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose derivative is finite where it takes roots of zero or leaves out a NaN."""
    return rewriting.rewrite(fun, _RULES, only_with=_NEEDED)


def _parts(opt_state: OptState) -> Iterator[Any]:
    """The named tuples of a state, the inner ones too."""
    if isinstance(opt_state, dict):
        opt_state = tuple(opt_state.values())
    if not isinstance(opt_state, tuple | list):
        return
    yield opt_state
    for part in opt_state:
        yield from _parts(part)


def _refused() -> dict[Any, Callable[[Any], str]]:
    """The states of optimizers that are refused, and the reason; "" if that one is right."""
    from optax import contrib

    per_example = "differentially private optimizers need one gradient per example"
    return {
        contrib.ScheduleFreeState: lambda _: (
            "the parameters that schedule_free steps are not those that it evaluates; use its base "
            "optimizer"
        ),
        optax.LookaheadState: lambda _: (
            "lookahead keeps two copies of the parameters; use its fast optimizer"
        ),
        contrib.SAMState: lambda _: (
            "sam takes gradients at other parameters than those that it steps; use its base optimizer"
        ),
        contrib.HutchinsonState: lambda _: (
            "sophia needs another loss function, obj_fn, which an inner loop does not have"
        ),
        contrib.DifferentiallyPrivateAggregateState: lambda _: per_example,
        optax.InjectHyperparamsState: _reason_for_low_precision,
        optax.InjectStatefulHyperparamsState: _reason_for_low_precision,
    }  # fmt: skip


def _reason_for_low_precision(state: Any) -> str:
    """Why injected hyperparameters of low precision are refused."""
    for name, value in state.hyperparams.items():
        dtype = jnp.result_type(value)
        if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
            return (
                f"inject_hyperparams keeps {name} in {dtype}, in which a decay of 0.999 is 1; pass "
                "hyperparam_dtype=jnp.float32"
            )
    return ""


@jax.custom_jvp
def _without_derivative(updates: Params) -> Params:
    return updates


@_without_derivative.defjvp
def _refuse(primals: tuple[Any], tangents: tuple[Any]) -> Any:
    raise TypeError(
        "a line search has no derivative, since its number of trials is not known before it runs; "
        "use the adjoint Implicit(), as jaxmaml.imaml does, or an optimizer without a line search"
    )


def _inert_where_singular(eqn: JaxprEqn, *operands: Any) -> list[Array]:
    """An elementwise operation that is a constant where it is singular.

    The operands are ones there, since zero times an infinite derivative is NaN. This is written with
    selections, which hold for derivatives of every order and for operands of any kind.
    """
    operation = functools.partial(eqn.primitive.bind, **eqn.params)
    where = _SINGULAR[eqn.primitive](eqn, *operands)
    if where is None:
        return [operation(*operands)]
    value = jax.lax.stop_gradient(operation(*jnp.broadcast_arrays(*operands)))
    elsewhere = [jnp.where(where, jnp.ones_like(operand), operand) for operand in operands]
    return [jnp.where(where, value, operation(*jnp.broadcast_arrays(*elsewhere)))]


def _power(eqn: JaxprEqn, base: Any, exponent: Any) -> Array | None:
    is_constant = isinstance(eqn.invars[0], Literal)
    return None if is_constant else (base == 0) & (exponent < 1)


def _quotient(eqn: JaxprEqn, _: Any, divisor: Any) -> Array | None:
    is_constant = isinstance(eqn.invars[1], Literal)
    return None if is_constant or not _is_float(divisor) else divisor == 0


def _product(eqn: JaxprEqn, first: Any, second: Any) -> Array | None:
    # A factor may be a NaN that a condition leaves out, as in the first steps of RAdam.
    is_constant = any(isinstance(atom, Literal) for atom in eqn.invars)
    return None if is_constant or not _is_float(first) else ~jnp.isfinite(first * second)


def _is_float(value: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(value), jnp.floating)


_SINGULAR: dict[Primitive, Callable[..., Array | None]] = {
    primitives.sqrt_p: lambda eqn, x: x <= 0,
    primitives.rsqrt_p: lambda eqn, x: x <= 0,
    primitives.cbrt_p: lambda eqn, x: x == 0,
    primitives.log_p: lambda eqn, x: x <= 0,
    primitives.log1p_p: lambda eqn, x: x <= -1,
    primitives.integer_pow_p: lambda eqn, x: x == 0 if eqn.params["y"] < 0 else None,
    primitives.pow_p: _power,
    primitives.div_p: _quotient,
    primitives.mul_p: _product,
}
"""Where the derivative of an operation is infinite or NaN; None for nowhere."""
_RULES = dict.fromkeys(_SINGULAR, _inert_where_singular)
_NEEDED = set(_SINGULAR) - {primitives.mul_p}
"""An update without any of these has no NaN of its own, and is left as it is."""
