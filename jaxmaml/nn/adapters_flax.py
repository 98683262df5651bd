"""Adapters for Flax modules: NNX, in which the built-in models are written, and Linen."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen, nnx
from jax.typing import DTypeLike

from jaxmaml import trees
from jaxmaml.nn.adapters import (
    Call,
    Forward,
    StatefulModel,
    as_dict,
    carried,
    default_call,
    is_sown,
    plain_fn,
    random_key,
    refuse_state,
    stateful_model,
)
from jaxmaml.types import Batch, Params, PlainFn, State

# Random keys are not state: the mean of a key over tasks has no meaning. Intermediates are outputs.
_STATE = nnx.All(nnx.Not(nnx.Param), nnx.Not(nnx.RngState), nnx.Not(nnx.Intermediate))


def from_nnx(
    module: nnx.Module, call: Call | None = None, *, compute_dtype: DTypeLike | None = None
) -> tuple[PlainFn, Params]:
    """Splits a Flax NNX module without state into a pure function and its parameters.

    The function runs the module in the mode that it is in now (`module.train()`, `module.eval()`).
    Its `nnx.Param` variables are the parameters. Random keys are constants: a dropout key kept in
    the module gives the same mask at every step. Put a key into the batch instead, as in the second
    example; `adapt` folds the inner step into it.

    Args:
        module: the model. It is not changed.
        call: `(module, batch) -> outputs`. Defaults to `module(batch["inputs"])`, with
            `weights=batch["weights"]` if the batch has it and the module takes it.
        compute_dtype: see `from_function`.

    Returns:
        `(apply_fn, params)`: `apply_fn(params, batch) -> outputs`, and a nested dict of arrays in
        which the items of an `nnx.List` have integer keys.

    Raises:
        TypeError: module is not an `nnx.Module`.
        ValueError: module carries state (any other variable, such as `nnx.BatchStat`).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxmaml import nn
        >>> apply_fn, params = nn.from_nnx(nn.MLP(1, 1, rngs=nnx.Rngs(0)))
        >>> apply_fn(params, {"inputs": jnp.ones((10, 1))}).shape
        (10, 1)

        Dropout, with the key in the batch:

        >>> def call(module, batch):
        ...     return module(batch["inputs"], rngs=nnx.Rngs(dropout=batch["key"]))
        >>> apply_fn, params = nn.from_nnx(nnx.Dropout(0.5), call)
        >>> batch = {"inputs": jnp.ones((2, 8)), "key": jax.random.key(0)}
        >>> apply_fn(params, batch).shape
        (2, 8)
    """
    forward, params, state = _split_nnx(module, call)
    refuse_state("from_nnx", trees.leaf_paths(state))
    return plain_fn(forward, compute_dtype), params


def from_nnx_with_state(
    module: nnx.Module, call: Call | None = None, *, compute_dtype: DTypeLike | None = None
) -> StatefulModel:
    """Splits a Flax NNX module with state into a function for training and one for tests.

    The training function keeps the mode of each part of the module, so that a part that was frozen
    by `module.part.eval()` stays frozen. The test function is in evaluation mode. The state holds all
    variables other than parameters, random keys, intermediates and what else the module sows.

    Args:
        module: the model. It is not changed.
        call: `(module, batch) -> outputs`; see `from_nnx`.
        compute_dtype: see `from_function`.

    Returns:
        A `StatefulModel`, whose params and state are nested dicts of arrays.

    Raises:
        TypeError: module is not an `nnx.Module`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxmaml import nn
        >>> model = nn.from_nnx_with_state(nnx.BatchNorm(1, momentum=0.5, rngs=nnx.Rngs(0)))
        >>> batch = {"inputs": jnp.array([[1.0], [3.0]])}
        >>> outputs, state = model.train_fn(model.params, batch, model.state)  # mean 2
        >>> state["mean"].tolist()
        [1.0]
        >>> outputs, _ = model.test_fn(model.params, batch, state)  # mean 1
        >>> round(float(outputs[0, 0]), 3)
        0.0
    """
    test_module = nnx.clone(_checked_nnx(module))
    test_module.eval()
    train, params, state = _split_nnx(module, call or _default_in_training(module))
    test, _, _ = _split_nnx(test_module, call)
    return stateful_model(train, test, params, state, compute_dtype)


def from_linen(
    module: linen.Module,
    variables: Mapping[str, Any],
    call: Call | None = None,
    *,
    compute_dtype: DTypeLike | None = None,
) -> tuple[PlainFn, Params]:
    """Returns a Flax Linen module without state as a pure function, and its parameters.

    A typed PRNG key `batch["key"]`, if the batch has one, seeds every random stream of the module
    (dropout); `adapt` folds the inner step into it.

    Args:
        module: the model.
        variables: as `module.init` returns them. The collection "params" is meta-learned.
        call: `(bound module, batch) -> outputs`. Defaults to `module(batch["inputs"])`, with
            `weights=batch["weights"]` if the batch has it and the module takes it.
        compute_dtype: see `from_function`.

    Returns:
        `(apply_fn, params)`: `apply_fn(params, batch) -> outputs`, and a nested dict of arrays.

    Raises:
        TypeError: module is not a `linen.Module`.
        ValueError: variables have no collection "params", or another one beside it ("batch_stats")
            that holds more than sown values.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen
        >>> from jaxmaml import nn
        >>> module = linen.Dense(3)
        >>> variables = module.init(jax.random.key(0), jnp.ones((1, 2)))
        >>> apply_fn, params = nn.from_linen(module, variables)
        >>> apply_fn(params, {"inputs": jnp.ones((10, 2))}).shape
        (10, 3)
    """
    params, state = _split_variables(module, variables)
    # Nothing is mutable here, so that `sow` does nothing and any other tuple is missed by Linen.
    kept = [
        path
        for path, node in jax.tree.leaves_with_path(state, is_leaf=is_sown)
        if not is_sown(node)
    ]
    refuse_state("from_linen", [trees.leaf_path(path) for path in kept])
    return plain_fn(_linen_forward(module, call), compute_dtype), params


def from_linen_with_state(
    module: linen.Module,
    variables: Mapping[str, Any],
    call: Call | None = None,
    test_call: Call | None = None,
    *,
    compute_dtype: DTypeLike | None = None,
) -> StatefulModel:
    """Returns a Flax Linen module with state as its functions in training and evaluation mode.

    The collection "params" is meta-learned; all others ("batch_stats") are the state, and mutable
    in both modes. Values that the module sows are not carried: what `module.init` has sown stays as
    it is. A typed PRNG key `batch["key"]` seeds the random streams, as in `from_linen`.

    Args:
        module: the model.
        variables: as `module.init` returns them.
        call: `(bound module, batch) -> outputs` in training mode; see `from_linen` for the default.
        test_call: the same in evaluation mode. Defaults to `call`, for a module whose two modes are
            the same.
        compute_dtype: see `from_function`.

    Returns:
        A `StatefulModel`, whose params and state are nested dicts of arrays.

    Raises:
        TypeError: module is not a `linen.Module`.
        ValueError: variables have no collection "params"; when called, if a variable changes its
            structure, shape or dtype.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen
        >>> from jaxmaml import nn
        >>> module = linen.BatchNorm()
        >>> inputs = jnp.array([[1.0], [3.0]])
        >>> variables = module.init(jax.random.key(0), inputs, use_running_average=True)
        >>> model = nn.from_linen_with_state(
        ...     module, variables,
        ...     lambda module, batch: module(batch["inputs"], use_running_average=False),
        ...     lambda module, batch: module(batch["inputs"], use_running_average=True),
        ... )
        >>> _, state = model.train_fn(model.params, {"inputs": inputs}, model.state)
        >>> [round(float(x), 2) for x in state["batch_stats"]["mean"]]
        [0.02]
    """
    params, state = _split_variables(module, variables)
    train = _linen_forward(module, call or _default_in_training(module))
    test = _linen_forward(module, test_call or call)
    return stateful_model(train, test, params, state, compute_dtype)


def _checked_nnx(module: Any) -> nnx.Module:
    if not isinstance(module, nnx.Module):
        raise TypeError(f"module must be a flax.nnx.Module, got {type(module).__name__}")
    return module


def _default_in_training(module: Any) -> Call:
    return default_call(type(module).__call__, has_statistics=True)


def _split_nnx(module: Any, call: Call | None) -> tuple[Forward, Params, dict[str, Any]]:
    """Returns the forward pass of an NNX module, its parameters and its state."""
    run = call or default_call(type(_checked_nnx(module)).__call__)
    graphdef, *groups = nnx.split(module, nnx.Param, _STATE, ...)
    params, state, constants = (as_dict(nnx.as_pure(group)) for group in groups)

    def forward(params: Params, batch: Batch, state: State) -> tuple[Any, State]:
        # Without the copy BatchNorm cannot update its statistics under a transformation.
        rebuilt = nnx.merge(graphdef, params, state, constants, copy=True)
        outputs = run(rebuilt, batch)
        return outputs, carried(state, as_dict(nnx.as_pure(nnx.state(rebuilt, _STATE))))

    return forward, params, state


def _split_variables(module: Any, variables: Mapping[str, Any]) -> tuple[Params, dict[str, Any]]:
    """Returns the parameters of a Linen module, and the collections that are its state."""
    if not isinstance(module, linen.Module):
        raise TypeError(f"module must be a flax.linen.Module, got {type(module).__name__}")
    collections = as_dict(variables)
    if "params" not in collections:
        raise ValueError(f"variables must have the collection 'params', got {sorted(collections)}")
    return collections.pop("params"), collections


def _linen_forward(module: linen.Module, call: Call | None) -> Forward:
    run = call or default_call(type(module).__call__)

    def forward(params: Params, batch: Batch, state: State) -> tuple[Any, State]:
        outputs, updates = module.apply(
            {"params": params, **state},
            batch,
            rngs=random_key(batch),
            method=run,
            mutable=list(state),
        )
        return outputs, carried(as_dict(state), as_dict({**state, **updates}))

    return forward
