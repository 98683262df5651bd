"""Metrics of adapted models, and their summary over tasks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmaml.checks import check_integer_classes, checked_weights
from jaxmaml.scores import accuracy as accuracy
from jaxmaml.types import Array, Batch, Task


def mean_and_ci95(values: Any) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns the mean over tasks with its 95 % confidence interval, 1.96 standard errors.

    Args:
        values: `[num_tasks, ...]`, at least one task, such as the `[num_tasks, n + 1]` of `evaluate`.

    Returns:
        (mean [...], half width of the interval [...], number of tasks with a value that is not
        finite). A task that is not finite is never left out: the mean is NaN there.

    Raises:
        TypeError: complex values.
        ValueError: no tasks.

    Example:
        >>> mean, ci95, num_nonfinite = mean_and_ci95([0.5, 0.7])
        >>> round(float(mean), 3), round(float(ci95), 3), num_nonfinite
        (0.6, 0.196, 0)
    """
    if np.iscomplexobj(values):
        raise TypeError("values must be real numbers, got complex ones")
    values = np.asarray(values, np.float64)
    if values.ndim == 0 or not len(values):
        raise ValueError(
            f"values must have at least one task on its first axis; got {values.shape}"
        )
    finite = np.isfinite(values)
    num_nonfinite = int(np.sum(~finite.reshape(len(values), -1).all(axis=1)))
    values = np.where(finite, values, np.nan)
    spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1:], np.nan)
    return values.mean(axis=0), 1.96 * spread / np.sqrt(len(values)), num_nonfinite


def nearest_neighbor(task: Task, features_fn: Callable[[Batch], Array] | None = None) -> Array:
    """Returns the accuracy of the nearest support example, a baseline without adaptation.

    On raw inputs it is the least that a learner should reach. On the features of a network that was
    trained jointly it is the baseline of Ravi and Larochelle 2017 (section 5.1.1).

    Args:
        task: one task with "inputs" `[num_examples, ...]`, integer "targets" `[num_examples]` and,
            for padded examples, "weights" `[num_examples]`.
        features_fn: `(batch) -> [num_examples, num_features]`. Defaults to the inputs themselves.

    Returns:
        The fraction of query examples whose nearest support example, by Euclidean distance, has
        their class. It is NaN if a feature of an example that counts is not finite, if no example
        counts, and if a weight is wrong and traced.

    Raises:
        TypeError: targets that are not integers.
        ValueError: features, targets or weights of another shape; a weight that is negative or not
            finite, unless it is traced.

    Example:
        >>> import jax.numpy as jnp, jaxmaml
        >>> support = {"inputs": jnp.array([[0.0], [4.0]]), "targets": jnp.array([0, 1])}
        >>> query = {"inputs": jnp.array([[1.0], [9.0]]), "targets": jnp.array([0, 0])}
        >>> float(nearest_neighbor(jaxmaml.Task(support, query)))
        0.5
    """
    features_fn = features_fn or (lambda batch: batch["inputs"].reshape(len(batch["inputs"]), -1))
    support, query = (_labeled(features_fn(batch), batch) for batch in task)
    # Far from the origin the squares would hide the distances: the support's mean becomes the origin.
    number = jnp.maximum(jnp.sum(support.weights > 0), 1)
    center = jnp.sum(support.features, 0) / number
    support = support._replace(features=support.features - center)
    products = jnp.matmul(query.features - center, support.features.T, precision="highest")
    # Without ||query||², which is the same for all.
    distance = jnp.sum(support.features**2, -1) - 2 * products
    nearest = support.targets[jnp.where(support.weights > 0, distance, jnp.inf).argmin(-1)]
    right = jnp.asarray(nearest == query.targets, distance.dtype)
    share = jnp.sum(query.weights * right) / jnp.sum(query.weights)
    is_known = jnp.all(jnp.isfinite(distance)) & jnp.any(support.weights > 0)
    return jnp.where(is_known, share, jnp.nan) + support.zero + query.zero


class _Labeled(NamedTuple):
    """Features `[num_examples, num_features]`, zero for padding, with what belongs to them.

    `zero` is 0, or NaN if the weights are wrong; see `checks.zero_or_nan`.
    """

    features: Array
    targets: Array
    weights: Array
    zero: Array


def _labeled(features: Array, batch: Batch) -> _Labeled:
    features, targets = jnp.asarray(features), jnp.asarray(batch["targets"])
    check_integer_classes(targets)
    if features.ndim != 2 or targets.shape != features.shape[:1]:
        raise ValueError(
            "features must be [num_examples, num_features] and targets [num_examples], got shapes "
            f"{features.shape} and {targets.shape}"
        )
    dtype = jnp.promote_types(features.dtype, jnp.float32)
    weights, zero = checked_weights(
        batch.get("weights", jnp.ones(len(targets))), len(targets), dtype
    )
    features = jnp.where(weights[:, None] > 0, features.astype(dtype), 0)
    return _Labeled(features, targets, weights, zero)
