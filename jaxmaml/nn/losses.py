"""Losses and accuracy of a model on batches `{"inputs", "targets"}`.

Each function takes a model and returns a loss or metric in its form: `(params, batch) -> value`,
or, for a model marked by `jaxmaml.types.with_state`, a marked `(params, batch, state) -> (value,
state)`. If the batch has "weights" `[num_examples]`, the value is the weighted mean sum(w v) /
sum(w) over examples. Examples of weight zero may hold anything, NaN and targets out of range
included: the model gets zeros in their place. A model that compares examples, such as one with batch
statistics, must take the weights itself. If all weights are zero, the value is NaN.

Shapes and types are always checked. Targets and weights out of their range are refused where their
values are known. Where they are traced, as under `jit` and in an inner loop, the value and its
gradient are NaN, so that training stops and names the loss; they are never a wrong number.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import jax.numpy as jnp
import optax

from jaxmaml import scores
from jaxmaml.checks import (
    check_class_shapes,
    check_floating,
    check_real,
    checked_weights,
    zero_or_nan,
    zero_where_class,
)
from jaxmaml.nn.adapters import ModelT
from jaxmaml.padding import blank_padding
from jaxmaml.types import Array, Batch, Params, State, as_stateful, in_form_of


def cross_entropy(apply_fn: ModelT) -> ModelT:
    """Returns the mean softmax cross-entropy of a classifier, in nats.

    Args:
        apply_fn: `(params, batch) -> logits [num_examples, ..., way]`, or a model with state.

    Returns:
        A loss function in the form of apply_fn. Its batch holds integer "targets"
        `[num_examples, ...]` in 0..way-1, and optionally "weights" `[num_examples]`.

    Raises:
        TypeError: when called, if targets are not integers or the batch is not a mapping.
        ValueError: when called, if targets are missing or their shape does not fit the logits; if a
            target is not a class or a weight is negative, unless they are traced.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmaml import nn
        >>> loss_fn = nn.cross_entropy(nn.from_function(lambda params, inputs: inputs @ params))
        >>> batch = {"inputs": jnp.eye(2), "targets": jnp.array([0, 1])}
        >>> print(round(float(loss_fn(jnp.zeros((2, 4)), batch)), 4))  # log(4)
        1.3863
    """
    return _score_of_model(apply_fn, _weighted_mean_of(_cross_entropies))


def mean_squared_error(apply_fn: ModelT) -> ModelT:
    """Returns the mean squared error of a regressor, without a factor of one half.

    Args:
        apply_fn: `(params, batch) -> predictions [num_examples, ...]`, or a model with state.

    Returns:
        A loss function in the form of apply_fn. Its batch holds "targets" of exactly the shape of
        the predictions (`[n]` against `[n, 1]` is refused), and optionally "weights"
        `[num_examples]`.

    Raises:
        TypeError: when called, if predictions are not floating-point, targets not real or the batch
            is not a mapping.
        ValueError: when called, if targets are missing or do not have the shape of the predictions;
            if a weight is negative, unless they are traced.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmaml import nn
        >>> apply_fn = nn.from_function(lambda params, inputs: params * inputs)
        >>> loss_fn = nn.mean_squared_error(apply_fn)
        >>> batch = {"inputs": jnp.array([1.0, 2.0]), "targets": jnp.array([0.0, 2.0])}
        >>> print(loss_fn(2.0, batch))  # (2² + 2²) / 2
        4.0
    """
    return _score_of_model(apply_fn, _weighted_mean_of(_squared_errors))


def binary_cross_entropy(apply_fn: ModelT) -> ModelT:
    """Returns the mean sigmoid cross-entropy of a binary classifier with one logit, in nats.

    Args:
        apply_fn: `(params, batch) -> logits` of class 1, `[num_examples]` or `[num_examples, 1]`,
            or a model with state.

    Returns:
        A loss function in the form of apply_fn. Its batch holds "targets", `[num_examples]` or of
        the shape of the logits, integers, bools or floats: 0, 1, or the probability of class 1. It
        may hold "weights" `[num_examples]`.

    Raises:
        TypeError: when called, if logits are not floating-point, targets not real or the batch is
            not a mapping.
        ValueError: when called, if targets are missing or their shape does not fit the logits; if a
            target is outside of 0..1 or a weight is negative, unless they are traced.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmaml import nn
        >>> apply_fn = nn.from_function(lambda params, inputs: inputs @ params)
        >>> loss_fn = nn.binary_cross_entropy(apply_fn)
        >>> batch = {"inputs": jnp.eye(2), "targets": jnp.array([0, 1])}
        >>> print(round(float(loss_fn(jnp.zeros(2), batch)), 4))  # log(2)
        0.6931
    """
    return _score_of_model(apply_fn, _weighted_mean_of(_binary_cross_entropies))


def accuracy(apply_fn: ModelT) -> ModelT:
    """Returns the accuracy of a classifier as a metric, for `jaxmaml.evaluate`.

    `jaxmaml.accuracy` computes the same from logits.

    Args:
        apply_fn: `(params, batch) -> logits [num_examples, ..., way]`, or a model with state.

    Returns:
        A metric in the form of apply_fn: the share of examples in 0..1 whose largest logit is the
        target's, NaN if a logit of an example that counts is not finite. Its batch is that of
        `cross_entropy`.

    Raises:
        TypeError: when called, if targets are not integers or the batch is not a mapping.
        ValueError: when called, if targets are missing or their shape does not fit the logits; if a
            target is not a class or a weight is negative, unless they are traced.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmaml import nn
        >>> metric_fn = nn.accuracy(nn.from_function(lambda params, inputs: inputs @ params))
        >>> batch = {"inputs": jnp.eye(2), "targets": jnp.array([0, 0])}
        >>> print(metric_fn(jnp.eye(2), batch))
        0.5
    """
    return _score_of_model(apply_fn, _accuracy)


def _score_of_model(apply_fn: ModelT, score: Callable[[Array, dict[str, Any]], Array]) -> ModelT:
    """Returns `score(outputs, batch)` of a model as a function in the form of the model."""
    model = as_stateful(apply_fn)

    def scored(params: Params, batch: Batch, state: State) -> tuple[Array, State]:
        batch = _blank_batch(batch)
        outputs, state = model(params, batch, state)
        return score(jnp.asarray(outputs), batch), state

    return cast(ModelT, in_form_of(apply_fn, scored))


def _blank_batch(batch: Batch) -> dict[str, Any]:
    """Returns the batch as a dict, with zeros in place of padded examples."""
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


def _weighted_mean_of(
    losses: Callable[[Array, Array], Array],
) -> Callable[[Array, dict[str, Any]], Array]:
    """Returns the mean of `losses(outputs, targets)` over examples, weighted if the batch is."""

    def mean(outputs: Array, batch: dict[str, Any]) -> Array:
        targets = jnp.asarray(batch["targets"])
        if "weights" not in batch:
            return losses(outputs, targets).mean()
        outputs = blank_padding(outputs, batch["weights"])
        # In half precision, the sum of the weights could overflow.
        dtype = jnp.promote_types(outputs.dtype, jnp.float32)
        weights, zero = checked_weights(batch["weights"], len(outputs), dtype)
        values = losses(outputs + zero.astype(outputs.dtype), targets)
        values = values.mean(axis=tuple(range(1, values.ndim)))
        return ((weights * values).sum() / weights.sum()).astype(values.dtype)

    return mean


def _accuracy(logits: Array, batch: dict[str, Any]) -> Array:
    return scores.accuracy(logits, batch["targets"], batch.get("weights"))


def _cross_entropies(logits: Array, targets: Array) -> Array:
    check_class_shapes(logits, targets)
    logits = logits + zero_where_class(targets, logits.shape[-1], logits.dtype)[..., None]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)


def _binary_cross_entropies(logits: Array, targets: Array) -> Array:
    check_floating("logits", logits)
    check_real("targets", targets)
    if logits.ndim == 0 or logits.shape[1:] not in ((), (1,)):
        raise ValueError(
            f"logits must be [num_examples] or [num_examples, 1], one each, got shape {logits.shape}"
        )
    if targets.shape not in (logits.shape, logits.shape[:1]):
        raise ValueError(
            f"targets must be [num_examples] or have the shape of the logits, got shapes "
            f"{targets.shape} and {logits.shape}"
        )
    is_probability = lambda targets: (targets >= 0) & (targets <= 1)
    logits, targets, rule = logits.reshape(-1), targets.reshape(-1), "targets must be in 0..1"
    logits = logits + zero_or_nan(is_probability, targets, rule, logits.dtype)
    return optax.losses.sigmoid_binary_cross_entropy(logits, targets.astype(logits.dtype))


def _squared_errors(predictions: Array, targets: Array) -> Array:
    check_floating("predictions", predictions)
    check_real("targets", targets)
    if targets.ndim == 0 or predictions.shape != targets.shape:
        raise ValueError(
            f"targets must have the shape of the predictions, [num_examples, ...], got "
            f"{targets.shape} and {predictions.shape}"
        )
    return optax.losses.squared_error(predictions, targets)
