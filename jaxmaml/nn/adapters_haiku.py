"""Adapters for Haiku transformations. Haiku is imported when an adapter is called."""

from collections.abc import Callable, Mapping
from typing import Any

from jax.typing import DTypeLike

from jaxmaml.nn.adapters import (
    Call,
    Forward,
    StatefulModel,
    as_dict,
    carried,
    inputs_of,
    plain_fn,
    random_key,
    stateful_model,
)
from jaxmaml.types import Batch, Params, PlainFn, State


def from_haiku(
    transformed: Any,
    params: Mapping[str, Any],
    call: Call | None = None,
    *,
    compute_dtype: DTypeLike | None = None,
) -> tuple[PlainFn, Params]:
    """Returns a Haiku transformation without state as a pure function, and its parameters.

    A typed PRNG key `batch["key"]`, if the batch has one, is what `hk.next_rng_key` draws from
    (dropout); `adapt` folds the inner step into it.

    Args:
        transformed: the result of `hk.transform`.
        params: as `transformed.init` returns them.
        call: `(apply, batch) -> outputs`, where `apply(*args, **kwargs)` is the transformed
            function with parameters and key filled in. Defaults to `apply(batch["inputs"])`.
        compute_dtype: see `from_function`.

    Returns:
        `(apply_fn, params)`: `apply_fn(params, batch) -> outputs`, and a nested dict of arrays
        whose paths are Haiku's, "mlp/~/linear_0/w".

    Raises:
        TypeError: transformed is not a result of `hk.transform`.

    Example:
        >>> import haiku as hk, jax, jax.numpy as jnp
        >>> from jaxmaml import nn
        >>> transformed = hk.transform(lambda inputs: hk.nets.MLP([8, 3])(inputs))
        >>> params = transformed.init(jax.random.key(0), jnp.ones((1, 2)))
        >>> apply_fn, params = nn.from_haiku(transformed, params)
        >>> apply_fn(params, {"inputs": jnp.ones((10, 2))}).shape
        (10, 3)
    """
    import haiku as hk

    if isinstance(transformed, hk.TransformedWithState):
        raise TypeError(
            "from_haiku takes models without state, and a result of hk.transform_with_state carries "
            "the state that its init returns; use from_haiku_with_state"
        )
    if not isinstance(transformed, hk.Transformed):
        raise TypeError(
            f"transformed must be a result of hk.transform, got {type(transformed).__name__}"
        )
    forward = _forward(hk.with_empty_state(transformed), call)
    return plain_fn(forward, compute_dtype), as_dict(params)


def from_haiku_with_state(
    transformed: Any,
    params: Mapping[str, Any],
    state: Mapping[str, Any],
    call: Call,
    test_call: Call,
    *,
    compute_dtype: DTypeLike | None = None,
) -> StatefulModel:
    """Returns a Haiku transformation with state as its functions in training and evaluation mode.

    Parameters and random keys are as in `from_haiku`.

    Args:
        transformed: the result of `hk.transform_with_state`.
        params: the first result of `transformed.init`.
        state: its second result.
        call: `(apply, batch) -> outputs` in training mode, where `apply(*args, **kwargs)` is the
            transformed function with parameters, state and key filled in, to be called once:
            `lambda apply, batch: apply(batch["inputs"], is_training=True)`.
        test_call: the same in evaluation mode.
        compute_dtype: see `from_function`.

    Returns:
        A `StatefulModel`, whose params and state are nested dicts of arrays.

    Raises:
        TypeError: transformed is not a result of `hk.transform_with_state`.

    Example:
        >>> import haiku as hk, jax, jax.numpy as jnp
        >>> from jaxmaml import nn
        >>> def network(inputs, is_training):
        ...     return hk.BatchNorm(True, True, 0.5)(inputs, is_training)
        >>> transformed = hk.transform_with_state(network)
        >>> inputs = jnp.array([[1.0], [3.0]])
        >>> model = nn.from_haiku_with_state(
        ...     transformed, *transformed.init(jax.random.key(0), inputs, True),
        ...     lambda apply, batch: apply(batch["inputs"], is_training=True),
        ...     lambda apply, batch: apply(batch["inputs"], is_training=False),
        ... )
        >>> _, state = model.train_fn(model.params, {"inputs": inputs}, model.state)
        >>> state["batch_norm/~/mean_ema"]["average"].tolist()
        [[2.0]]
    """
    import haiku as hk

    if not isinstance(transformed, hk.TransformedWithState):
        raise TypeError(
            "transformed must be a result of hk.transform_with_state, "
            f"got {type(transformed).__name__}"
        )
    train, test = (_forward(transformed, mode) for mode in (call, test_call))
    return stateful_model(train, test, as_dict(params), as_dict(state), compute_dtype)


def _forward(transformed: Any, call: Callable[..., Any] | None) -> Forward:
    """Returns the forward pass of a result of `hk.transform_with_state`."""
    run = call or (lambda apply, batch: apply(inputs_of(batch)))

    def forward(params: Params, batch: Batch, state: State) -> tuple[Any, State]:
        key, before = random_key(batch), as_dict(state)

        def apply(*args: Any, **kwargs: Any) -> Any:
            nonlocal state
            outputs, state = transformed.apply(params, state, key, *args, **kwargs)
            return outputs

        outputs = run(apply, batch)
        return outputs, carried(before, as_dict(state))

    return forward
