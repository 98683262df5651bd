"""The form in which the convolutions of any model are computed, whatever library it is written in.

Per-task kernels turn `lax.conv_general_dilated` under `vmap` into a grouped convolution, whose
derivatives XLA computes 35 to 95 times slower on a CPU than products of patches and a matrix. A model
calls it through the layers of Flax, Haiku or Equinox; here its operations are replaced in the traced
function.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn, primitives

from jaxmaml import rewriting
from jaxmaml.nn import layouts
from jaxmaml.nn.general_conv import conv_general
from jaxmaml.nn.pooling import pool_by
from jaxmaml.types import ModelFn, StatefulFn, with_state

PATCHES_ARE_FASTER = {"cpu": True, "gpu": False, "tpu": False}
"""Whether a product of patches is the faster form on a backend, by measurement.

On a CPU it is ahead with shared kernels, too (benchmarks/convolution.py: 45 to 57 GFLOP/s beside 34 to
46 for `lax.conv` in the wide layers of Conv4). GPUs and TPUs have not been measured and are left alone.
A backend that is missing here is left alone.
"""
MOST_TAPS = 128
"""A kernel with more entries per channel is left alone: there is one slice of the inputs for each."""


class Convolution(NamedTuple):
    """A convolution or a max-pooling of a model; see `convolutions_of`.

    Attributes:
        kind: "convolution" or "max-pooling".
        inputs: the shape of its inputs.
        kernel: the shape of the kernel, or of the pooled window.
        outputs: the shape of its outputs.
        dtype: the dtype of its outputs.
        replaced: whether `fast_convolutions` computes it in another form.
        reason: why not; "" if it does.

    Example:
        >>> import jax
        >>> from jaxmaml import nn
        >>> images, kernel = jnp.ones((1, 1, 8, 8)), jnp.ones((4, 1, 3, 3))
        >>> same = lambda images, kernel: jax.lax.conv(images, kernel, (1, 1), "SAME")
        >>> nn.convolutions_of(same, images, kernel)[0].outputs
        (1, 4, 8, 8)
    """

    kind: str
    inputs: tuple[int, ...]
    kernel: tuple[int, ...]
    outputs: tuple[int, ...]
    dtype: Any
    replaced: bool
    reason: str


def fast_convolutions(apply_fn: ModelFn) -> ModelFn:
    """Returns a model with its convolutions and max-poolings in the form that is fast with `vmap`.

    The result equals that of `apply_fn` up to rounding, derivatives of every order included. On a CPU
    a convolution becomes patches times a matrix, and a max-pooling whose windows do not overlap becomes
    that of `nn.max_pool`, also inside `jit`, `checkpoint`, `scan`, `while_loop` and `cond`. Strides,
    padding, dilation and groups are kept, in any number of dimensions. What has a derivative rule of
    its own (`custom_jvp`, `custom_vjp`) is left as it is, and so is everything on a GPU or TPU, where
    XLA's own form is expected to be the faster one; `convolutions_of` lists what is replaced.

    Args:
        apply_fn: a model of any library, as an adapter returns it, or any other function of pytrees of
            arrays that JAX can trace. A function that `with_state` marks stays marked.

    Raises:
        TypeError: apply_fn is not callable or, when called, cannot be traced.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxmaml import nn
        >>> module = nnx.Conv(1, 4, (3, 3), rngs=nnx.Rngs(0))
        >>> apply_fn, params = nn.from_nnx(module)
        >>> fast = nn.fast_convolutions(apply_fn)
        >>> fast(params, {"inputs": jnp.ones((2, 8, 8, 1))}).shape
        (2, 8, 8, 4)
    """
    if not callable(apply_fn):
        raise TypeError(f"fast_convolutions takes a function; got {type(apply_fn).__name__}")
    if isinstance(apply_fn, StatefulFn):
        return with_state(fast_convolutions(apply_fn.fn))

    @functools.wraps(apply_fn)
    def fast(*args: Any, **kwargs: Any) -> Any:
        if not _patches_are_faster():
            return apply_fn(*args, **kwargs)
        called = lambda args, kwargs: apply_fn(*args, **kwargs)
        with _explained("fast_convolutions", apply_fn):
            rewritten = rewriting.rewrite(
                called, _RULES, carried=layouts.RULES, settle=layouts.settle
            )
            return rewritten(args, kwargs)

    return fast


def convolutions_of(apply_fn: ModelFn, *args: Any, **kwargs: Any) -> list[Convolution]:
    """Returns the convolutions and max-poolings of a model, in the order of the computation.

    Args:
        apply_fn: a model, as `fast_convolutions` takes it. It is traced, not run.
        args, kwargs: its arguments; arrays or their shapes (`jax.ShapeDtypeStruct`).

    Raises:
        TypeError: apply_fn is not callable or cannot be traced.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxmaml import nn
        >>> apply_fn, params = nn.from_nnx(nnx.Conv(1, 4, (3, 3), rngs=nnx.Rngs(0)))
        >>> found = nn.convolutions_of(apply_fn, params, {"inputs": jnp.ones((2, 8, 8, 1))})
        >>> [(conv.kind, conv.kernel, conv.outputs) for conv in found]
        [('convolution', (3, 3, 1, 4), (2, 8, 8, 4))]
    """
    if not callable(apply_fn):
        raise TypeError(f"convolutions_of takes a function; got {type(apply_fn).__name__}")
    with _explained("convolutions_of", apply_fn):
        jaxpr = jax.make_jaxpr(lambda args, kwargs: apply_fn(*args, **kwargs))(args, kwargs)
    return list(_listed(jaxpr.jaxpr))


def _listed(jaxpr: Any) -> Iterator[Convolution]:
    for eqn, holder in rewriting.operations(jaxpr):
        if eqn.primitive not in _RULES:
            continue
        inputs, *kernels = (_aval(atom) for atom in eqn.invars)
        outputs = _aval(eqn.outvars[0])
        if kernels:
            kind, kernel = "convolution", kernels[0].shape
        else:
            kind, kernel = "max-pooling", eqn.params["window_dimensions"]
        held = f"it is inside {holder}, which is left as it is" if holder else ""
        reason = _why_left(eqn) or held
        yield Convolution(
            kind, inputs.shape, tuple(kernel), outputs.shape, outputs.dtype,
            not reason, reason,
        )  # fmt: skip


@contextlib.contextmanager
def _explained(caller: str, function: Callable[..., Any]) -> Iterator[None]:
    """Turns JAX's errors about a function that it cannot trace into one line."""
    try:
        yield
    except (TypeError, jax.errors.JAXIndexError) as error:
        is_known = any(text in str(error) for text in ("valid JAX type", "abstract array"))
        if not isinstance(error, _NOT_TRACEABLE) and not is_known:
            raise
        name = getattr(function, "__name__", type(function).__name__)
        first = str(error).strip().splitlines()[0]
        raise TypeError(
            f"{caller} takes a function that JAX can trace, which {name} is not: {first}"
        ) from error


_NOT_TRACEABLE = (
    jax.errors.ConcretizationTypeError,  # also of a bool
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def _aval(atom: Any) -> Any:
    """Returns the type of an operand, which has a shape and a dtype."""
    return atom.aval


def _patches_are_faster() -> bool:
    return PATCHES_ARE_FASTER.get(jax.default_backend(), False)


def _why_left(eqn: JaxprEqn) -> str:
    """Returns why a convolution or a max-pooling is not replaced; "" if it is."""
    if not _patches_are_faster():
        return f"the form of XLA is kept on a {jax.default_backend()}"
    if any(0 in _aval(atom).shape for atom in (*eqn.invars, *eqn.outvars)):
        return "it is empty"
    return _REASONS[eqn.primitive](eqn)


def _why_convolution_is_left(eqn: JaxprEqn) -> str:
    _, _, *space = eqn.params["dimension_numbers"].rhs_spec
    num_taps = math.prod(_aval(eqn.invars[1]).shape[axis] for axis in space)
    if num_taps > MOST_TAPS:
        return f"its kernel has {num_taps} entries per channel, more than {MOST_TAPS}"
    return ""


def _why_pooling_is_left(eqn: JaxprEqn) -> str:
    params, dtype = eqn.params, eqn.invars[0].aval.dtype  # pyright: ignore
    if not jnp.issubdtype(dtype, jnp.number):
        return f"it pools numbers of type {dtype}"
    if set(params["base_dilation"]) | set(params["window_dilation"]) != {1}:
        return "it is dilated"
    if params["window_dimensions"] != params["window_strides"]:
        return "its windows overlap or have gaps"
    return ""


def _convolution(eqn: JaxprEqn, inputs: Any, kernel: Any) -> list[Any] | None:
    if _why_left(eqn):
        return None
    # The inputs as they are stored, and the outputs with channels last.
    specs, order = eqn.params["dimension_numbers"], layouts.order_of(inputs)
    batch, channels, *space = specs.out_spec
    last = (0, len(order) - 1, *range(1, len(order) - 1))
    numbers = specs._replace(lhs_spec=tuple(map(order.index, specs.lhs_spec)), out_spec=last)
    outputs = conv_general(
        layouts.stored_in(inputs, order), layouts.settle(kernel),
        **{**eqn.params, "dimension_numbers": numbers},
    )  # fmt: skip
    return [layouts.moved(outputs, (batch, *space, channels))]


def _pooling(eqn: JaxprEqn, inputs: Any) -> list[Any] | None:
    if _why_left(eqn):
        return None
    # What is added at the borders is never the maximum.
    order = layouts.order_of(inputs)
    stored = layouts.stored_in(inputs, order)
    is_float = jnp.issubdtype(stored.dtype, jnp.floating)
    lowest = -jnp.inf if is_float else jnp.iinfo(stored.dtype).min
    padding = [(*sides, 0) for sides in layouts.permuted(eqn.params["padding"], order)]
    padded = lax.pad(stored, jnp.asarray(lowest, stored.dtype), padding)

    # The pooled axes stand before the last one.
    windows = layouts.permuted(eqn.params["window_dimensions"], order)
    pooled = [axis for axis, window in enumerate(windows) if window > 1]
    others = [axis for axis, window in enumerate(windows) if window == 1]
    places = (*others[:-1], *pooled, *others[-1:])
    values = padded.transpose(places)
    values = values if others else values[..., None]
    outputs = pool_by(values, tuple(windows[axis] for axis in pooled))(values)
    outputs = outputs if others else outputs[..., 0]
    return [layouts.moved(outputs, layouts.permuted(order, places))]


_RULES = {
    primitives.conv_general_dilated_p: _convolution,
    primitives.reduce_window_max_p: _pooling,
}
_REASONS = {
    primitives.conv_general_dilated_p: _why_convolution_is_left,
    primitives.reduce_window_max_p: _why_pooling_is_left,
}
