"""Loss functions over batches `{"inputs", "targets"}`, and "weights" where examples are padded."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax

from jaxmaml.nn.padding import blank_padding
from jaxmaml.types import Array, Batch, LossFn


def cross_entropy(apply_fn: Callable[..., Any], *, has_state: bool = False) -> LossFn:
    """Mean softmax cross-entropy of a classifier.

    With "weights" `[num_examples]` in the batch it is the weighted mean sum(w l) / sum(w), in nats;
    examples of zero weight may hold anything, NaN and targets out of range included. (All weights
    zero: NaN.)

    Args:
        apply_fn: `(params, batch) -> logits [num_examples, ..., way]`; with has_state,
            `(params, batch, state) -> (logits, state)`. As `from_nnx` and its siblings return it.
        has_state: whether apply_fn carries a state.

    Returns:
        `loss_fn(params, batch)`, or `loss_fn(params, batch, state) -> (loss, state)`. The batch
        holds integer "targets" `[num_examples, ...]` in 0..way-1.

    Raises:
        TypeError: when called, if targets are not integers or the batch is no mapping.
        ValueError: when called, if targets are absent or of another shape.

    >>> import jax.numpy as jnp
    >>> from jaxmaml import nn
    >>> loss_fn = nn.cross_entropy(nn.from_function(lambda params, inputs: inputs @ params))
    >>> batch = {"inputs": jnp.eye(2), "targets": jnp.array([0, 1])}
    >>> print(round(float(loss_fn(jnp.zeros((2, 4)), batch)), 4))  # log(4)
    1.3863
    """
    return _mean_loss(apply_fn, _cross_entropies, has_state)


def mean_squared_error(apply_fn: Callable[..., Any], *, has_state: bool = False) -> LossFn:
    """Mean squared error of a regressor, without a factor of one half.

    With "weights" `[num_examples]` in the batch it is the weighted mean over examples,
    sum(w l) / sum(w); examples of zero weight may hold anything. (All weights zero: NaN.)

    Args:
        apply_fn: `(params, batch) -> predictions [num_examples, ...]`; with has_state,
            `(params, batch, state) -> (predictions, state)`.
        has_state: whether apply_fn carries a state.

    Returns:
        `loss_fn(params, batch)`, or `loss_fn(params, batch, state) -> (loss, state)`. The batch
        holds "targets" of exactly the shape of the predictions: `[n]` against `[n, 1]` is refused.

    Raises:
        TypeError: when called, if predictions are not real numbers or the batch is no mapping.
        ValueError: when called, if targets are absent or of another shape.

    >>> import jax.numpy as jnp
    >>> from jaxmaml import nn
    >>> loss_fn = nn.mean_squared_error(nn.from_function(lambda params, inputs: params * inputs))
    >>> batch = {"inputs": jnp.array([1.0, 2.0]), "targets": jnp.array([0.0, 2.0])}
    >>> print(loss_fn(2.0, batch))  # (2² + 2²) / 2
    4.0
    """
    return _mean_loss(apply_fn, _squared_errors, has_state)


def binary_cross_entropy(apply_fn: Callable[..., Any], *, has_state: bool = False) -> LossFn:
    """Mean sigmoid cross-entropy of a classifier of two classes, by one logit.

    With "weights" `[num_examples]` in the batch it is the weighted mean sum(w l) / sum(w), in nats;
    examples of zero weight may hold anything. (All weights zero: NaN.)

    Args:
        apply_fn: `(params, batch) -> logits [num_examples]` or `[num_examples, 1]`, of class 1;
            with has_state, `(params, batch, state) -> (logits, state)`.
        has_state: whether apply_fn carries a state.

    Returns:
        `loss_fn(params, batch)`, or `loss_fn(params, batch, state) -> (loss, state)`. The batch
        holds "targets" `[num_examples]`: 0 or 1, as integers, bools or floats; a float between is
        the probability of class 1.

    Raises:
        TypeError: when called, if logits are not real numbers or the batch is no mapping.
        ValueError: when called, if targets are absent or shapes are others.

    >>> import jax.numpy as jnp
    >>> from jaxmaml import nn
    >>> loss_fn = nn.binary_cross_entropy(nn.from_function(lambda params, inputs: inputs @ params))
    >>> batch = {"inputs": jnp.eye(2), "targets": jnp.array([0, 1])}
    >>> print(round(float(loss_fn(jnp.zeros(2), batch)), 4))  # log(2)
    0.6931
    """
    return _mean_loss(apply_fn, _binary_cross_entropies, has_state)


def _mean_loss(
    apply_fn: Callable[..., Any], losses: Callable[[Array, Array], Array], has_state: bool
) -> LossFn:
    def loss_fn(params: Any, batch: Batch) -> Array:
        batch = _blank_batch(batch)
        return _weighted_mean(losses, apply_fn(params, batch), batch)

    def loss_fn_with_state(params: Any, batch: Batch, state: Any) -> tuple[Array, Any]:
        batch = _blank_batch(batch)
        outputs, state = apply_fn(params, batch, state)
        return _weighted_mean(losses, outputs, batch), state

    return loss_fn_with_state if has_state else loss_fn


def _blank_batch(batch: Batch) -> dict[str, Any]:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batch must be a mapping with 'inputs' and 'targets', got {type(batch).__name__}"
        )
    if "targets" not in batch:
        raise ValueError(f"batch must have 'targets', got only {sorted(batch)}")
    if "weights" not in batch:
        return dict(batch)
    examples = {name: batch[name] for name in ("inputs", "targets") if name in batch}
    return {**batch, **blank_padding(examples, batch["weights"])}


def _weighted_mean(
    losses: Callable[[Array, Array], Array], outputs: Array, batch: dict[str, Any]
) -> Array:
    outputs, targets = jnp.asarray(outputs), jnp.asarray(batch["targets"])
    if "weights" not in batch:
        return losses(outputs, targets).mean()
    values = losses(blank_padding(outputs, batch["weights"]), targets)
    values = values.mean(axis=tuple(range(1, values.ndim)))
    weights = jnp.asarray(batch["weights"], values.dtype)
    return (weights * values).sum() / weights.sum()


def _cross_entropies(logits: Array, targets: Array) -> Array:
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(f"targets must be integer class labels, got {targets.dtype}")
    if targets.ndim == 0 or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets must be [num_examples] for logits [num_examples, way], got shapes "
            f"{targets.shape} and {logits.shape}"
        )
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)


def _binary_cross_entropies(logits: Array, targets: Array) -> Array:
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"logits must be floating-point, got {logits.dtype}")
    if targets.ndim != 1 or logits.shape not in (targets.shape, (*targets.shape, 1)):
        raise ValueError(
            f"targets must be [num_examples] for logits [num_examples] or [num_examples, 1], got "
            f"shapes {targets.shape} and {logits.shape}"
        )
    logits = logits.reshape(targets.shape)
    return optax.losses.sigmoid_binary_cross_entropy(logits, targets.astype(logits.dtype))


def _squared_errors(predictions: Array, targets: Array) -> Array:
    if not jnp.issubdtype(predictions.dtype, jnp.floating):
        raise TypeError(f"predictions must be floating-point, got {predictions.dtype}")
    if targets.ndim == 0 or predictions.shape != targets.shape:
        raise ValueError(
            f"targets must have the shape of the predictions, [num_examples, ...], got "
            f"{targets.shape} and {predictions.shape}"
        )
    return optax.losses.squared_error(predictions, targets)
