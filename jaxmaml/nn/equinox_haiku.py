"""From an Equinox module or a Haiku transformation to `(apply_fn, params, state)`.

What these three are says `jaxmaml.nn.adapters`. Neither library comes with this package: each is
imported when its adapter is called.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxmaml.nn.adapters import (
    ApplyFn,
    as_dict,
    cast,
    cast_back,
    inputs_of,
    random_key,
    without_empty_state,
)
from jaxmaml.types import Batch, Params, State


def from_equinox(
    module: Any,
    call: Callable[..., Any] | None = None,
    *,
    state: Any = None,
    compute_dtype: Any = None,
) -> tuple[ApplyFn, Params, State]:
    """Takes an Equinox module apart.

    The module's floating-point arrays are the parameters, all else is constant. The parameters are
    a module themselves, with None in the other places, whose leaves have paths such as
    "layers/0/weight"; `eqx.combine(adapted, module)` is the adapted model.

    Equinox modules are written for one example, and so is the default `call`: it maps the module
    over the examples, under the axis name "batch", which `eqx.nn.BatchNorm` is to be given. A typed
    random key `batch["key"]`, where the batch has one and the module takes a `key`, is split over
    the examples (dropout); `adapt` folds the inner step into it.

    Args:
        module: the model.
        call: `(module, batch) -> outputs`, with a state `(module, batch, state) -> (outputs,
            state)`; unless told, the module over the examples of `batch["inputs"]`.
        state: the second result of `eqx.nn.make_with_state`, None for a model without.
        compute_dtype: see `from_function`.

    Returns:
        apply_fn, params and state; with no state, `apply_fn(params, batch)` and `()`.

    Raises:
        TypeError: if module is no `eqx.Module`.

    >>> import equinox as eqx, jax, jax.numpy as jnp
    >>> from jaxmaml import nn
    >>> model = eqx.nn.MLP(2, 3, width_size=8, depth=1, key=jax.random.key(0))
    >>> apply_fn, params, state = nn.from_equinox(model)
    >>> apply_fn(params, {"inputs": jnp.ones((10, 2))}).shape, state
    ((10, 3), ())
    """
    import equinox as eqx

    if not isinstance(module, eqx.Module):
        raise TypeError(f"module must be an equinox.Module, got {type(module).__name__}")
    params, constants = eqx.partition(module, eqx.is_inexact_array)
    call = call or _over_examples(module)

    def apply_fn(params: Params, batch: Batch, *state: State) -> Any:
        params, batch = cast((params, batch), compute_dtype)
        # A copy, since an Equinox state that has been written to refuses to be read again.
        state = jax.tree.map(lambda leaf: leaf, state)
        out = call(eqx.combine(params, constants), batch, *state)
        if not state:
            return cast_back(out, compute_dtype)
        return cast_back(out[0], compute_dtype), out[1]

    return apply_fn, params, () if state is None else state


def from_haiku(
    transformed: Any,
    params: Mapping[str, Any],
    state: Mapping[str, Any] | tuple[()] = (),
    call: Callable[[Callable[..., Any], Batch], Any] | None = None,
    *,
    compute_dtype: Any = None,
) -> tuple[ApplyFn, Params, State]:
    """Makes an apply_fn of a Haiku transformation.

    A typed random key `batch["key"]`, where the batch has one, is what `hk.next_rng_key` draws from
    (dropout); `adapt` folds the inner step into it.

    Args:
        transformed: the result of `hk.transform` or `hk.transform_with_state`.
        params: as its `init` returns them.
        state: as its `init` returns it; `()` for `hk.transform`.
        call: `(apply, batch) -> outputs`, in which `apply(*args, **kwargs)` is the transformed
            function with parameters, state and key filled in, to be called once; unless told,
            `apply(batch["inputs"])`. One that needs `is_training` or the weights says so here:
            `lambda apply, batch: apply(batch["inputs"], is_training=True)`.
        compute_dtype: see `from_function`.

    Returns:
        apply_fn, params and state, both nested dicts; paths are Haiku's, "mlp/~/linear_0/w".

    Raises:
        TypeError: if transformed is no such result.
        ValueError: if a state is given that `hk.transform` cannot carry.

    >>> import haiku as hk, jax, jax.numpy as jnp
    >>> from jaxmaml import nn
    >>> transformed = hk.transform(lambda inputs: hk.nets.MLP([8, 3])(inputs))
    >>> params = transformed.init(jax.random.key(0), jnp.ones((1, 2)))
    >>> apply_fn, params, state = nn.from_haiku(transformed, params)
    >>> apply_fn(params, {"inputs": jnp.ones((10, 2))}).shape, state
    ((10, 3), ())
    """
    has_state = _is_stateful(transformed)
    if state and not has_state:
        raise ValueError("a state needs hk.transform_with_state, got the result of hk.transform")
    call = call or (lambda apply, batch: apply(inputs_of(batch)))

    def apply_with_state(params: Params, batch: Batch, state: State) -> tuple[Any, State]:
        params, batch = cast((params, batch), compute_dtype)
        key = random_key(batch)

        def apply(*args: Any, **kwargs: Any) -> Any:
            nonlocal state
            if not has_state:
                return transformed.apply(params, key, *args, **kwargs)
            outputs, state = transformed.apply(params, state, key, *args, **kwargs)
            return outputs

        outputs = cast_back(call(apply, batch), compute_dtype)
        return outputs, as_dict(state)

    return without_empty_state(apply_with_state, as_dict(params), as_dict(state) or {})


def _over_examples(module: Any) -> Callable[..., Any]:
    """`(module, batch, *state)`: the module over the examples, a key for each."""
    takes_key = "key" in inspect.signature(module).parameters

    def call(module: Any, batch: Batch, *state: State) -> Any:
        inputs, key = inputs_of(batch), random_key(batch) if takes_key else None
        keys = None if key is None else jax.random.split(key, inputs.shape[0])

        def one(example: Any, key: Any, *state: State) -> Any:
            options = {} if key is None else {"key": key}
            return module(example, *state, **options)

        axes = (0, None if keys is None else 0, *(None for _ in state))
        out_axes = (0, None) if state else 0
        return jax.vmap(one, axes, out_axes, axis_name="batch")(inputs, keys, *state)

    return call


def _is_stateful(transformed: Any) -> bool:
    import haiku as hk

    if not isinstance(transformed, hk.Transformed | hk.TransformedWithState):
        raise TypeError(
            "transformed must be a result of hk.transform or hk.transform_with_state, "
            f"got {type(transformed).__name__}"
        )
    return isinstance(transformed, hk.TransformedWithState)
