"""Adapters for Equinox modules. Equinox is imported when an adapter is called."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax.typing import DTypeLike

from jaxmaml import trees
from jaxmaml.nn.adapters import (
    Call,
    Forward,
    StatefulModel,
    inputs_of,
    plain_fn,
    random_key,
    refuse_state,
    refuse_weights,
    stateful_model,
)
from jaxmaml.types import Batch, Params, PlainFn, State


def from_equinox(
    module: Any, call: Call | None = None, *, compute_dtype: DTypeLike | None = None
) -> tuple[PlainFn, Params]:
    """Splits an Equinox module without state into a pure function and its parameters.

    The floating-point arrays of the module are the parameters, everything else is constant. The
    parameters are a module themselves, with None in place of constants, and their leaves have paths
    such as "layers/0/weight"; `eqx.combine(adapted, module)` is the adapted model.

    Equinox modules are written for one example, so the default `call` maps the module over the
    examples, under the axis name "batch" (for `eqx.nn.BatchNorm`). A typed PRNG key `batch["key"]`
    is split over the examples if the module takes a `key` (dropout); `adapt` folds the inner step
    into it.

    Args:
        module: the model, in the mode in which it is to run (`eqx.nn.inference_mode`).
        call: `(module, batch) -> outputs`. Defaults to the module over the examples of
            `batch["inputs"]`.
        compute_dtype: see `from_function`.

    Returns:
        `(apply_fn, params)`, where `apply_fn(params, batch) -> outputs`.

    Raises:
        TypeError: module is not an `eqx.Module`.
        ValueError: module carries state (it holds an `eqx.nn.StateIndex`).

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> from jaxmaml import nn
        >>> module = eqx.nn.MLP(2, 3, width_size=8, depth=1, key=jax.random.key(0))
        >>> apply_fn, params = nn.from_equinox(module)
        >>> apply_fn(params, {"inputs": jnp.ones((10, 2))}).shape
        (10, 3)
    """
    _check_module(module)
    run, params = _split(module, call)
    refuse_state("from_equinox", _state_paths(module))
    forward = lambda params, batch, state: (run(params, batch), state)
    return plain_fn(forward, compute_dtype), params


def from_equinox_with_state(
    module: Any,
    state: Any,
    call: Callable[[Any, Batch, State], tuple[Any, State]] | None = None,
    *,
    compute_dtype: DTypeLike | None = None,
) -> StatefulModel:
    """Splits an Equinox module with state into a function for training and one for tests.

    The training function keeps the mode of each part of the module. The test function is in the mode
    of `eqx.nn.inference_mode`. Parameters, the default call and random keys are as in
    `from_equinox`.

    Args:
        module: the first result of `eqx.nn.make_with_state`.
        state: its second result. Neither function invalidates the state that it is given.
        call: `(module, batch, state) -> (outputs, state)`. Defaults to the module over the examples
            of `batch["inputs"]`.
        compute_dtype: see `from_function`.

    Returns:
        A `StatefulModel`, whose state is an `eqx.nn.State`.

    Raises:
        TypeError: module is not an `eqx.Module`, or state is not an `eqx.nn.State`.
        ValueError: module still holds its initial state, as before `eqx.nn.make_with_state`.

    Example:
        >>> import equinox as eqx, jax.numpy as jnp
        >>> from jaxmaml import nn
        >>> norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(1, "batch", mode="batch")
        >>> model = nn.from_equinox_with_state(norm, state)
        >>> batch = {"inputs": jnp.array([[1.0], [3.0]])}
        >>> outputs, state = model.train_fn(model.params, batch, model.state)
        >>> outputs.shape, state.get(norm.batch_counter).item()
        ((2, 1), 1)
    """
    import equinox as eqx

    _check_module(module)
    _refuse_initial_state(module)
    run, params = _split(module, call or _over_examples(module, has_statistics=True))
    run_in_test, _ = _split(eqx.nn.inference_mode(module), call)
    if not isinstance(state, eqx.nn.State):
        raise TypeError(f"state must be an equinox.nn.State, got {type(state).__name__}")
    train, test = map(_keeping_state, (run, run_in_test))
    return stateful_model(train, test, params, state, compute_dtype)


def _check_module(module: Any) -> None:
    import equinox as eqx

    if not isinstance(module, eqx.Module):
        raise TypeError(f"module must be an equinox.Module, got {type(module).__name__}")


def _split(module: Any, call: Callable[..., Any] | None) -> tuple[Callable[..., Any], Params]:
    """Returns `(params, batch, *state) -> call(module, batch, *state)`, and the parameters."""
    import equinox as eqx

    params, constants = eqx.partition(module, eqx.is_inexact_array)
    run = call or _over_examples(module)
    return lambda params, *args: run(eqx.combine(params, constants), *args), params


def _keeping_state(run: Callable[..., Any]) -> Forward:
    """Returns the forward pass that leaves the state which it is given usable."""

    def forward(params: Params, batch: Batch, state: State) -> tuple[Any, State]:
        # An Equinox state that has been written to cannot be read again, so the model gets a copy.
        return run(params, batch, jax.tree.map(lambda leaf: leaf, state))

    return forward


def _state_paths(module: Any) -> list[str]:
    """Returns the path of each `eqx.nn.StateIndex` in a module."""
    import equinox as eqx

    is_index = lambda node: isinstance(node, eqx.nn.StateIndex)
    nodes = jax.tree.leaves_with_path(module, is_leaf=is_index)
    return [trees.leaf_path(path) for path, node in nodes if is_index(node)]


def _refuse_initial_state(module: Any) -> None:
    """Raises ValueError if an index holds the initial value of its state, which is not a parameter."""
    import equinox as eqx

    is_index = lambda node: isinstance(node, eqx.nn.StateIndex)
    for path, node in jax.tree.leaves_with_path(module, is_leaf=is_index):
        if is_index(node) and jax.tree.leaves(node):
            raise ValueError(
                f"module holds the initial value of its state at {trees.leaf_path(path)}: pass both "
                "results of eqx.nn.make_with_state, the module and the state"
            )


def _over_examples(module: Any, *, has_statistics: bool = False) -> Callable[..., Any]:
    """Returns `(module, batch, *state)` that maps the module over examples, with a key for each."""
    takes_key = "key" in inspect.signature(module).parameters

    def call(module: Any, batch: Batch, *state: State) -> Any:
        if has_statistics:
            refuse_weights(batch)
        inputs, key = inputs_of(batch), random_key(batch) if takes_key else None
        keys = None if key is None else jax.random.split(key, inputs.shape[0])

        def one(example: Any, key: Any, *state: State) -> Any:
            options = {} if key is None else {"key": key}
            return module(example, *state, **options)

        axes = (0, None if keys is None else 0, *(None for _ in state))
        out_axes = (0, None) if state else 0
        return jax.vmap(one, axes, out_axes, axis_name="batch")(inputs, keys, *state)

    return call
