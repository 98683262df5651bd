"""Metrics of adapted models, and their summary over tasks."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

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
        ValueError: no tasks.

    Example:
        >>> mean, ci95, num_nonfinite = mean_and_ci95([0.5, 0.7])
        >>> round(float(mean), 3), round(float(ci95), 3), num_nonfinite
        (0.6, 0.196, 0)
    """
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
        their class; NaN if a feature is not finite.

    Example:
        >>> import jax.numpy as jnp, jaxmaml
        >>> support = {"inputs": jnp.array([[0.0], [4.0]]), "targets": jnp.array([0, 1])}
        >>> query = {"inputs": jnp.array([[1.0], [9.0]]), "targets": jnp.array([0, 0])}
        >>> float(nearest_neighbor(jaxmaml.Task(support, query)))
        0.5
    """
    features_fn = features_fn or (lambda batch: batch["inputs"].reshape(len(batch["inputs"]), -1))
    support, query = (features_fn(batch) for batch in task)
    distance = (
        jnp.sum(support**2, -1) - 2 * query @ support.T
    )  # without ||query||², which is the same for all
    present = task.support.get("weights", jnp.ones(len(support))) > 0
    nearest = task.support["targets"][jnp.where(present, distance, jnp.inf).argmin(-1)]
    right = jnp.asarray(nearest == task.query["targets"], query.dtype)
    share = jnp.average(right, weights=task.query.get("weights"))
    return jnp.where(jnp.all(jnp.isfinite(distance)), share, jnp.nan)
