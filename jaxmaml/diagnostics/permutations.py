"""The dependence of a result on the labels that the classes of a task are given.

The head of an N-way learner starts from different weights for each of N labels, and the classes of a
task can be given these labels in N! ways. Ye and Chao 2021 (arXiv 2106.16245, section 5) find very
different accuracies. A learner whose head starts the same for every label does not depend on it.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxmaml import outer
from jaxmaml.batching import ChunkSize
from jaxmaml.checks import check_count
from jaxmaml.types import (
    Array,
    Batch,
    Info,
    MetaLearner,
    MetaParams,
    MetaState,
    MetricFn,
    Params,
    State,
    Task,
    View,
    as_stateful,
    with_state,
)

_LARGEST_WAY = 8
"""8! is 40,320 permutations, which takes as many adaptations."""


def label_permutations(
    way: int, *, key: Array | None = None, num_permutations: int | None = None
) -> Array:
    """Returns permutations of the labels of one task.

    Args:
        way: number of classes.
        key: typed PRNG key that draws `num_permutations` of them, with repetition. Without both, all
            permutations are listed, the identity first.
        num_permutations: the number to draw.

    Returns:
        Integers `[num_permutations, way]`: entry c of a row is the label that class c is given.

    Raises:
        ValueError: a way below 1, or above 8 if all are listed; one of key and num_permutations
            without the other; a number below 1.

    Example:
        >>> label_permutations(3)[:3].tolist(), label_permutations(5).shape
        ([[0, 1, 2], [0, 2, 1], [1, 0, 2]], (120, 5))
        >>> label_permutations(20, key=jax.random.key(0), num_permutations=50).shape
        (50, 20)
    """
    check_count("way", way)
    if (key is None) != (num_permutations is None):
        raise ValueError("key and num_permutations must be given together")
    if key is not None and num_permutations is not None:
        check_count("num_permutations", num_permutations)
        draw = lambda key: jax.random.permutation(key, way)
        return jax.vmap(draw)(jax.random.split(key, num_permutations))
    if way > _LARGEST_WAY:
        raise ValueError(
            f"{way} classes have {math.factorial(way):,} permutations; give key and "
            "num_permutations to draw some of them"
        )
    return jnp.asarray(np.array(list(itertools.permutations(range(way))), np.int32))


def metric_by_permutation(
    learner: MetaLearner,
    metric_fn: MetricFn,
    meta_params: MetaParams,
    task: Task,
    permutations: Any,
    *,
    state: State = (),
    num_inner_steps: int | None = None,
    chunk_size: ChunkSize = "auto",
) -> Any:
    """Returns a metric after every inner step, for every labeling of the classes of one task.

    Args:
        learner: the meta-learner.
        metric_fn: a metric, as in `jaxmaml.evaluate`.
        meta_params: the meta-parameters of the learner.
        task: one task whose batches are mappings with integer "targets" in 0..way-1.
        permutations: `[num_permutations, way]`, see `label_permutations`.
        state: the state of the loss function.
        num_inner_steps: inner steps n. Defaults to those of training.
        chunk_size: how many permutations are computed at once, as in `jaxmaml.evaluate`.

    Returns:
        `[num_permutations, n + 1]`, or such leaves. The spread over the first axis shows how much
        depends on the labels; all rows are equal if nothing does.

    Raises:
        ValueError: batches without "targets", targets outside of 0..way-1, or rows that are not
            permutations. Under `jit`, the values of traced arrays are not checked: a target out of
            range stays as it is, of which the losses and metrics of this package make NaN.
        TypeError: targets that are not integers.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> def loss_fn(logits, batch):
        ...     return optax.losses.softmax_cross_entropy_with_integer_labels(
        ...         logits, batch["targets"]
        ...     ).mean()
        >>> learner = jaxmaml.maml(lambda p, batch: loss_fn(p[None], batch), optax.sgd(1.0), 1)
        >>> score = lambda adapted, query: jaxmaml.accuracy(adapted[None], query["targets"])
        >>> batch = {"targets": jnp.array([0])}
        >>> params = jnp.array([9.0, 0.0])
        >>> metric_by_permutation(
        ...     learner, score, params, jaxmaml.Task(batch, batch), label_permutations(2)
        ... ).tolist()
        [[1.0, 1.0], [0.0, 0.0]]
    """
    rows = _checked(permutations)
    for name, batch in task._asdict().items():
        _check_targets(name, batch, rows.shape[1])

    def relabeled(permutation: Array) -> Task:
        return Task(*(_relabel(batch, permutation) for batch in task))

    # To `evaluate` the permutations are the tasks, so that what they share exists only once.
    def trace(meta_params: MetaParams, permutation: Array, view: View, **options: Any) -> Any:
        return learner.trace(meta_params, relabeled(permutation).support, view, **options)

    def loss(meta_params: MetaParams, permutation: Task, **options: Any) -> tuple[Array, Info]:
        return learner.loss(meta_params, relabeled(permutation.support), **options)

    def score(adapted: Params, permutation: Array, state: State) -> tuple[Any, State]:
        return as_stateful(metric_fn)(adapted, relabeled(permutation).query, state)

    permuted = learner._replace(trace=trace, loss=loss)
    meta_state = MetaState(meta_params, (), jnp.zeros((), jnp.int32), state)
    return outer.evaluate(
        permuted, with_state(score), meta_state, Task(rows, rows),
        num_inner_steps=num_inner_steps, chunk_size=chunk_size,
    )  # fmt: skip


def _relabel(batch: Batch, permutation: Array) -> Batch:
    targets = jnp.asarray(batch["targets"])
    # A target outside of 0..way-1, which is refused unless it is traced, stays outside.
    is_class = (targets >= 0) & (targets < len(permutation))
    relabeled = permutation.astype(targets.dtype)[targets]
    return {**batch, "targets": jnp.where(is_class, relabeled, targets)}


def _check_targets(name: str, batch: Batch, way: int) -> None:
    if not isinstance(batch, Mapping) or "targets" not in batch:
        raise ValueError(f"the {name} must be a mapping with integer 'targets'")
    dtype = jnp.result_type(batch["targets"])
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"the {name}'s targets must be integers; got {dtype}")
    if isinstance(batch["targets"], Tracer):
        return
    targets = np.asarray(batch["targets"])
    if ((targets < 0) | (targets >= way)).any():
        raise ValueError(f"the {name}'s targets must be in 0..{way - 1}, like the permutations")


def _checked(permutations: Any) -> Array:
    rows = permutations if isinstance(permutations, Tracer) else np.asarray(permutations)
    if rows.ndim != 2 or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise ValueError(
            f"permutations must be integers [num_permutations, way]; got {rows.dtype} {rows.shape}"
        )
    num_labels = rows.shape[1]
    if not isinstance(rows, Tracer) and (np.sort(rows) != np.arange(num_labels)).any():
        raise ValueError(f"each row of permutations must hold 0..{num_labels - 1} once")
    return jnp.asarray(rows)
