"""The adapter for a plain function, and the functions that all adapters share.

An adapter turns a model of some library into a pure function of a parameter pytree and a batch,
which the losses of `jaxmaml.nn` take. There are two forms:

- `from_nnx`, `from_linen`, `from_equinox` and `from_haiku` return `(apply_fn, params)`, where
  `apply_fn(params, batch) -> outputs`. They refuse a model that carries state, such as running
  statistics.
- `from_nnx_with_state` and its siblings return a `StatefulModel`: a function for training mode and
  one for evaluation mode, both marked by `jaxmaml.types.with_state`.

A model that takes an argument `weights` receives `batch["weights"]` if the batch has it. One that
carries state in training mode must take it, or be given a `call`: the statistics of a batch
normalization would count padded examples, too.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxmaml import trees
from jaxmaml.checks import check_count
from jaxmaml.types import (
    Array,
    Batch,
    ModelFn,
    Params,
    PlainFn,
    State,
    StatefulFn,
    as_stateful,
    in_form_of,
    with_state,
)

Call: TypeAlias = Callable[[Any, Batch], Any]
"""`(model, batch) -> outputs`: how an adapter runs a model on a batch."""
ModelT = TypeVar("ModelT", bound=ModelFn)
"""The form of a model, which the losses and metrics of the model have, too."""
Forward: TypeAlias = Callable[[Params, Batch, State], tuple[Any, State]]
"""`(params, batch, state) -> (outputs, state)`: the form into which each adapter brings a model."""


class StatefulModel(NamedTuple):
    """A model that carries state, as two pure functions of one parameter pytree.

    Attributes:
        train_fn: `(params, batch, state) -> (outputs, state)` in training mode, marked by
            `with_state`.
        test_fn: the same in evaluation mode.
        params: the initial parameters.
        state: the initial state.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxmaml import nn
        >>> module = nn.MLP(1, 1, norm="running", rngs=nnx.Rngs(0))
        >>> model = nn.from_nnx_with_state(module)
        >>> batch = {"inputs": jnp.ones((10, 1))}
        >>> outputs, state = model.train_fn(model.params, batch, model.state)
        >>> outputs.shape, sorted(state["norm"][0])
        ((10, 1), ['mean', 'var'])
    """

    train_fn: StatefulFn
    test_fn: StatefulFn
    params: Params
    state: State


def from_function(fn: Callable[..., Any], *, compute_dtype: DTypeLike | None = None) -> PlainFn:
    """Returns the apply_fn of a plain function of parameters and inputs.

    Args:
        fn: `(params, inputs) -> outputs`. If it takes `weights` and the batch has them, it is
            called with `weights=batch["weights"]`.
        compute_dtype: the dtype of the model's own arithmetic; None computes in the dtype of the
            parameters. With `jnp.bfloat16`, parameters and inputs are converted to bfloat16 and the
            outputs back to float32, so that parameters, inner updates, losses and gradients stay in
            float32. This is faster on GPU and TPU, and not exact.

    Returns:
        `apply_fn(params, batch) -> outputs`.

    Raises:
        ValueError: when called, if the batch is not a mapping with "inputs".

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmaml import nn
        >>> apply_fn = nn.from_function(lambda params, inputs: inputs @ params)
        >>> apply_fn(jnp.ones((2, 3)), {"inputs": jnp.ones((10, 2))}).shape
        (10, 3)
    """
    call = default_call(fn)
    forward = lambda params, batch, state: (call(params, batch), state)
    return plain_fn(forward, compute_dtype)


def first_ways(apply_fn: ModelT, way: int) -> ModelT:
    """Cuts logits to the first `way` columns, so that one model serves tasks of fewer ways.

    Args:
        apply_fn: the model, `(params, batch) -> logits [num_examples, ..., num_outputs]`, or a
            model marked by `with_state`.
        way: the number of columns to keep.

    Returns:
        A model in the form of apply_fn, with logits `[num_examples, ..., way]`.

    Raises:
        TypeError: way is not an integer.
        ValueError: way is less than 1; when called, if the model has fewer outputs than way.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmaml import nn
        >>> apply_fn = nn.first_ways(nn.from_function(lambda params, inputs: inputs @ params), 2)
        >>> apply_fn(jnp.ones((3, 5)), {"inputs": jnp.ones((10, 3))}).shape
        (10, 2)
    """
    way = check_count("way", way)
    model = as_stateful(apply_fn)

    def cut(params: Params, batch: Batch, state: State) -> tuple[Array, State]:
        logits, state = model(params, batch, state)
        if logits.shape[-1] < way:
            raise ValueError(
                f"a model with a head of {logits.shape[-1]} ways cannot serve {way}; only learners "
                "without a fixed head (protonet, proto_maml, r2d2, unicorn) can"
            )
        return logits[..., :way], state

    return cast(ModelT, in_form_of(apply_fn, cut))


def plain_fn(forward: Forward, compute_dtype: DTypeLike | None) -> PlainFn:
    """Returns `(params, batch) -> outputs` of a forward pass that needs no state."""
    forward = _computed_in(compute_dtype, forward)
    return lambda params, batch: forward(params, batch, {})[0]


def stateful_model(
    train: Forward, test: Forward, params: Params, state: State, compute_dtype: DTypeLike | None
) -> StatefulModel:
    """Returns the `StatefulModel` of two forward passes, in training and in evaluation mode."""
    train, test = (
        _computed_in(compute_dtype, _checking_state(forward, state)) for forward in (train, test)
    )
    return StatefulModel(with_state(train), with_state(test), params, state)


def _checking_state(forward: Forward, initial: State) -> Forward:
    """Returns the forward pass that refuses a state of another structure than the initial one."""
    structure, wanted = jax.tree.structure(initial), _shown(trees.leaf_paths(initial))

    def checked(params: Params, batch: Batch, state: State) -> tuple[Any, State]:
        if jax.tree.structure(as_dict(state)) != structure:
            found = _shown(trees.leaf_paths(state)) or "none"
            raise ValueError(
                f"the model carries the state {wanted}, and got {found}: pass state=model.state, the "
                "initial state of its StatefulModel, to init_state, adapt, meta_grad or loss"
            )
        return forward(params, batch, state)

    return checked


def carried(before: Any, after: Any, path: str = "") -> Any:
    """Returns the state after a call of a model, without what the model has sown.

    Flax modules can record values (`module.sow`): each call adds them to a tuple. They are outputs,
    not state: a tuple that has grown is returned as it was, and a new one is left out.

    Args:
        before: nested dicts: the state that the model was called with.
        after: the state that it returned.
        path: where both are in the whole state.

    Raises:
        ValueError: another variable is new, or has changed its structure, shape or dtype.

    Example:
        >>> carried({"mean": 0.0, "seen": (1,)}, {"mean": 0.5, "seen": (1, 2), "other": (3,)})
        {'mean': 0.5, 'seen': (1,)}
    """
    if isinstance(after, Mapping) and isinstance(before, Mapping):
        below = {
            name: carried(before.get(name, {}), value, f"{path}/{name}" if path else str(name))
            for name, value in after.items()
            if name in before or not is_sown(value)
        }
        # A submodule that is new because it has sown something has nothing to carry.
        kept = {k: v for k, v in below.items() if k in before or jax.tree.leaves(v)}
        return {**before, **kept}
    old, new = _types(before), _types(after)
    if is_sown(before) and is_sown(after) and len(new) > len(old) and new[: len(old)] == old:
        return before
    if new != old:
        raise ValueError(
            f"a call of the model changes its variable {path} from {old} to {new}: a state keeps its "
            "structure, shapes and dtypes from step to step"
        )
    return after


def is_sown(node: Any) -> bool:
    """Returns whether a variable holds what `module.sow` collects by default, a tuple."""
    return type(node) is tuple


def _types(node: Any) -> Any:
    """Returns the dtype and shape of each array of a pytree, such as float32[5, 3]."""
    return jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", node)


def refuse_state(adapter: str, names: list[str]) -> None:
    """Raises ValueError if a model carries state.

    Args:
        adapter: the name of the adapter for models without state, which was called.
        names: the paths of the state's leaves.
    """
    if names:
        raise ValueError(
            f"{adapter} takes models without state, and this one carries {_shown(names)}; "
            f"use {adapter}_with_state"
        )


def _shown(names: list[str]) -> str:
    return ", ".join([*names[:3], "..."] if len(names) > 3 else names)


def default_call(fn: Callable[..., Any], *, has_statistics: bool = False) -> Call:
    """Returns `(model, batch) -> fn(model, batch["inputs"])`, with the weights if fn takes them.

    Args:
        fn: the call of a model.
        has_statistics: whether to refuse weights that fn does not take, see `refuse_weights`.
    """
    takes_weights = "weights" in inspect.signature(fn).parameters

    def call(model: Any, batch: Batch) -> Any:
        inputs = inputs_of(batch)
        if takes_weights and "weights" in batch:
            return fn(model, inputs, weights=batch["weights"])
        if has_statistics:
            refuse_weights(batch)
        return fn(model, inputs)

    return call


def refuse_weights(batch: Batch) -> None:
    """Raises ValueError if the examples of a batch have weights that its model does not take.

    Example:
        >>> refuse_weights({"inputs": 0.0})
    """
    if "weights" in batch:
        raise ValueError(
            "the batch has weights and the model, which carries state, does not take them: padded "
            "examples would count in its batch statistics. Give the adapter a call that passes "
            'batch["weights"] on (nnx.BatchNorm: mask=), or one that leaves them out'
        )


def inputs_of(batch: Batch) -> Any:
    """Returns what a model is called with by default, `batch["inputs"]`."""
    if not isinstance(batch, Mapping) or "inputs" not in batch:
        raise ValueError(
            "batch must be a mapping with 'inputs', unless the adapter is given `call`"
        )
    return batch["inputs"]


def random_key(batch: Batch) -> Array | None:
    """Returns the typed PRNG key `batch["key"]`, or None if the batch has none."""
    key = batch.get("key") if isinstance(batch, Mapping) else None
    is_key = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if is_key else None


def as_dict(node: Any) -> Any:
    """Returns nested mappings of any kind as nested dicts."""
    if isinstance(node, Mapping):
        return {key: as_dict(value) for key, value in node.items()}
    return node


def _computed_in(dtype: DTypeLike | None, forward: Forward) -> Forward:
    """Returns the forward pass with its arithmetic in `dtype` and its outputs in float32."""
    if dtype is None:
        return forward

    def cast_forward(params: Params, batch: Batch, state: State) -> tuple[Any, State]:
        params, batch = _cast((params, batch), dtype)
        outputs, state = forward(params, batch, state)
        return _cast(outputs, jnp.float32), state

    return cast_forward


def _cast(tree: Any, dtype: DTypeLike) -> Any:
    """Returns a pytree with its floating-point leaves in another dtype."""

    def convert(leaf: Any) -> Any:
        return leaf.astype(dtype) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf

    return jax.tree.map(convert, tree)
