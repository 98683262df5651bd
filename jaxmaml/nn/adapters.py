"""From a model in one's own framework to `(apply_fn, params, state)`.

`apply_fn` is a pure function of a parameter pytree and a batch, which the losses of
`jaxmaml.nn.losses` turn into a `LossFn`:

- without a state, `apply_fn(params, batch) -> outputs`, and `state == ()`;
- with one (running statistics), `apply_fn(params, batch, state) -> (outputs, new_state)`.

Models that take an argument `weights` are given `batch["weights"]` where the batch has it. Adapters
from libraries that this package does not depend on are in `jaxmaml.nn.equinox_haiku`.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from jaxmaml.types import Batch, Params, State

ApplyFn = Callable[..., Any]

# Random keys are no state: the mean over tasks of a key means nothing. Intermediates are outputs.
_STATE = nnx.All(nnx.Not(nnx.Param), nnx.Not(nnx.RngState), nnx.Not(nnx.Intermediate))


def from_nnx(
    module: nnx.Module,
    call: Callable[[Any, Batch], Any] | None = None,
    *,
    compute_dtype: Any = None,
) -> tuple[ApplyFn, Params, State]:
    """Takes a Flax NNX module apart.

    The module stays as it is, and in the mode it is in (`module.train()`, `module.eval()`). Its
    `nnx.Param` variables are the parameters, all others the state, save random keys and
    intermediates: those are constants, hence a dropout key kept in the module gives the same mask
    at every step. Put a key into the batch instead, as in the example; `adapt` folds the inner
    step into it.

    Args:
        module: the model.
        call: `(module, batch) -> outputs`; unless told, `module(batch["inputs"])`, and
            `weights=batch["weights"]` where the batch has it and the module takes it.
        compute_dtype: see `from_function`.

    Returns:
        apply_fn, params and state as this module's docstring says; params and state are nested
        dicts of arrays, in which the items of an `nnx.List` have integer keys.

    Raises:
        TypeError: if module is no `nnx.Module`.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> from jaxmaml import nn
    >>> apply_fn, params, state = nn.from_nnx(nn.MLP(1, 1, rngs=nnx.Rngs(0)))
    >>> apply_fn(params, {"inputs": jnp.ones((10, 1))}).shape, state
    ((10, 1), ())

    Dropout, with the key in the batch:

    >>> def call(module, batch):
    ...     return module(batch["inputs"], rngs=nnx.Rngs(dropout=batch["key"]))
    >>> apply_fn, params, state = nn.from_nnx(nnx.Dropout(0.5), call)
    >>> batch = {"inputs": jnp.ones((2, 8)), "key": jax.random.key(0)}
    >>> apply_fn(params, batch).shape
    (2, 8)
    """
    if not isinstance(module, nnx.Module):
        raise TypeError(f"module must be a flax.nnx.Module, got {type(module).__name__}")
    call = call or _default_call(type(module).__call__)
    graphdef, *parts = nnx.split(module, nnx.Param, _STATE, ...)
    params, state, constants = (as_dict(nnx.as_pure(part)) for part in parts)

    def apply_with_state(params: Params, batch: Batch, state: State) -> tuple[Any, State]:
        params, batch = cast((params, batch), compute_dtype)
        # Without the copy BatchNorm cannot update its statistics under a transformation.
        rebuilt = nnx.merge(graphdef, params, state, constants, copy=True)
        outputs = cast_back(call(rebuilt, batch), compute_dtype)
        return outputs, as_dict(nnx.as_pure(nnx.state(rebuilt, _STATE)))

    return without_empty_state(apply_with_state, params, state)


def from_linen(
    module: linen.Module,
    variables: Mapping[str, Any],
    call: Callable[[Any, Batch], Any] | None = None,
    *,
    compute_dtype: Any = None,
) -> tuple[ApplyFn, Params, State]:
    """Takes a Flax Linen module and its variables apart.

    The collection "params" is meta-learned; all others ("batch_stats") are the state, and mutable.
    A typed random key `batch["key"]`, where the batch has one, feeds every random stream of the
    module (dropout); `adapt` folds the inner step into it.

    Args:
        module: the model.
        variables: as `module.init` returns them.
        call: `(bound module, batch) -> outputs`; unless told, `module(batch["inputs"])`, and
            `weights=batch["weights"]` where the batch has it and the module takes it.
        compute_dtype: see `from_function`.

    Returns:
        apply_fn, params and state as this module's docstring says.

    Raises:
        TypeError: if module is no `linen.Module`.
        ValueError: if variables has no collection "params".

    >>> import jax, jax.numpy as jnp
    >>> from flax import linen
    >>> from jaxmaml import nn
    >>> model = linen.Dense(3)
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 2)))
    >>> apply_fn, params, state = nn.from_linen(model, variables)
    >>> apply_fn(params, {"inputs": jnp.ones((10, 2))}).shape, state
    ((10, 3), ())
    """
    if not isinstance(module, linen.Module):
        raise TypeError(f"module must be a flax.linen.Module, got {type(module).__name__}")
    collections = as_dict(variables)
    if "params" not in collections:
        raise ValueError(f"variables must have the collection 'params', got {sorted(collections)}")
    params = collections.pop("params")
    call = call or _default_call(type(module).__call__)

    def apply_with_state(params: Params, batch: Batch, state: State) -> tuple[Any, State]:
        params, batch = cast((params, batch), compute_dtype)
        outputs, updates = module.apply(
            {"params": params, **state},
            batch,
            rngs=random_key(batch),
            method=call,
            mutable=list(state),
        )
        return cast_back(outputs, compute_dtype), {**state, **as_dict(updates)}

    return without_empty_state(apply_with_state, params, collections)


def from_function(fn: Callable[..., Any], *, compute_dtype: Any = None) -> ApplyFn:
    """Makes an apply_fn of a plain function.

    Args:
        fn: `(params, inputs) -> outputs`; it is given `weights=batch["weights"]` too where the
            batch has it and fn takes it.
        compute_dtype: None computes in the type of the parameters. jnp.bfloat16 converts parameters
            and inputs to it, and the outputs back to float32, so that only the model's own
            arithmetic is in bfloat16: parameters, inner updates, losses and gradients stay in
            float32. Faster on GPU and TPU, and not exact.

    Returns:
        `apply_fn(params, batch) -> outputs`.

    >>> import jax.numpy as jnp
    >>> from jaxmaml import nn
    >>> apply_fn = nn.from_function(lambda params, inputs: inputs @ params)
    >>> apply_fn(jnp.ones((2, 3)), {"inputs": jnp.ones((10, 2))}).shape
    (10, 3)
    """
    call = _default_call(fn)

    def apply_fn(params: Params, batch: Batch) -> Any:
        params, batch = cast((params, batch), compute_dtype)
        return cast_back(call(params, batch), compute_dtype)

    return apply_fn


def first_ways(apply_fn: ApplyFn, way: int, *, has_state: bool = False) -> ApplyFn:
    """Cuts logits to the first `way` columns: one model serves tasks of fewer ways than its head.

    Args:
        apply_fn: `(params, batch) -> logits [num_examples, ..., num_outputs]`; with has_state,
            `(params, batch, state) -> (logits, state)`.
        way: how many columns to keep.
        has_state: whether apply_fn carries a state.

    Returns:
        An apply_fn whose logits are `[num_examples, ..., way]`.

    Raises:
        ValueError: if way is less than 1; when called, if the model has fewer outputs.

    >>> import jax.numpy as jnp
    >>> from jaxmaml import nn
    >>> apply_fn = nn.first_ways(nn.from_function(lambda params, inputs: inputs @ params), 2)
    >>> apply_fn(jnp.ones((3, 5)), {"inputs": jnp.ones((10, 3))}).shape
    (10, 2)
    """
    if way < 1:
        raise ValueError(f"way must be at least 1, got {way}")

    def cut(logits: Any) -> Any:
        if logits.shape[-1] < way:
            raise ValueError(
                f"a model with a head of {logits.shape[-1]} ways cannot serve {way}; only learners "
                "without a fixed head (protonet, proto_maml, unicorn) can"
            )
        return logits[..., :way]

    def cut_with_state(params: Params, batch: Batch, state: State) -> tuple[Any, State]:
        logits, state = apply_fn(params, batch, state)
        return cut(logits), state

    return cut_with_state if has_state else lambda params, batch: cut(apply_fn(params, batch))


def inputs_of(batch: Batch) -> Any:
    """What a model sees of a batch unless told otherwise."""
    if not isinstance(batch, Mapping) or "inputs" not in batch:
        raise ValueError("batch must be a mapping with 'inputs', unless `call` says otherwise")
    return batch["inputs"]


def cast(tree: Any, dtype: Any) -> Any:
    """The floating-point leaves of a pytree in another type; None leaves them."""
    if dtype is None:
        return tree

    def convert(leaf: Any) -> Any:
        return leaf.astype(dtype) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf

    return jax.tree.map(convert, tree)


def cast_back(outputs: Any, compute_dtype: Any) -> Any:
    """What was computed in `compute_dtype`, in float32."""
    return outputs if compute_dtype is None else cast(outputs, jnp.float32)


def _default_call(fn: Callable[..., Any]) -> Callable[[Any, Batch], Any]:
    """`(model or params, batch) -> fn(model or params, inputs)`, with the weights fn may take."""
    takes_weights = "weights" in inspect.signature(fn).parameters

    def call(model: Any, batch: Batch) -> Any:
        inputs = inputs_of(batch)
        if takes_weights and "weights" in batch:
            return fn(model, inputs, weights=batch["weights"])
        return fn(model, inputs)

    return call


def without_empty_state(
    apply_with_state: ApplyFn, params: Params, state: dict[str, Any]
) -> tuple[ApplyFn, Params, State]:
    """Leaves a state out of the apply_fn of a model that has none."""
    if state:
        return apply_with_state, params, state

    def apply_fn(params: Params, batch: Batch) -> Any:
        return apply_with_state(params, batch, {})[0]

    return apply_fn, params, ()


def as_dict(node: Any) -> Any:
    """Nested mappings of any kind as plain dicts."""
    if isinstance(node, Mapping):
        return {key: as_dict(value) for key, value in node.items()}
    return node


def random_key(batch: Batch) -> Any:
    """The typed random key of a batch, None where it has none."""
    key = batch.get("key") if isinstance(batch, Mapping) else None
    is_key = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if is_key else None
