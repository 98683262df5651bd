"""Finding the first value that is not finite."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmaml import inner
from jaxmaml.learners.inner_loop import algorithm_of, in_training
from jaxmaml.trees import leaf_path
from jaxmaml.types import MetaLearner, MetaParams, Params, State, Task


def first_nonfinite(
    learner: MetaLearner,
    meta_params: MetaParams,
    task: Task,
    *,
    step: int = 0,
    state: State = (),
) -> str | None:
    """Returns where in the meta-gradient of one task a NaN or an infinity first appears.

    It looks at the meta-parameters, the support, the query and the state; then, for each inner step,
    at the batch that an `at_step` makes for it, at the loss before it and at the state and the
    parameters after it; last at the query loss, the
    meta-loss and the meta-gradient. Within each of these, leaves are in the order of their paths.
    It compiles and waits, so it cannot be called under `jit`.

    Args:
        learner: the meta-learner.
        meta_params: the meta-parameters at which the meta-gradient is taken.
        task: one task; `jax.tree.map(lambda leaf: leaf[i], tasks)` takes one of many.
        step: the outer step, for schedules and annealing.
        state: the state of the loss function.

    Returns:
        A place such as "support inputs" or "inner step 3: parameter conv/0/kernel", with steps
        counted from 1; None if everything is finite.

    Example:
        The norm of parameters that are zero has no finite derivative, and the loss stays finite.

        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean(batch) + jnp.sqrt(jnp.sum(params["w"] ** 2))
        >>> learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), 0)
        >>> task = jaxmaml.Task(jnp.ones(3), jnp.ones(3))
        >>> first_nonfinite(learner, {"w": jnp.zeros(2)}, task)
        'meta-gradient w'
        >>> first_nonfinite(learner, {"w": jnp.ones(2)}, task) is None
        True
    """
    flags = jax.device_get(_flags(learner, meta_params, task, step, state))
    return next((place for place, finite in _in_order(flags) if not finite), None)


_DIGITS = 4
"""The digits of the number of a leaf."""


class _Flags(NamedTuple):
    """Whether each leaf is finite, {path: flag}, by place.

    Attributes:
        given: the arguments, by name.
        batches: what an `at_step` makes for each inner step, flags `[n]`.
        inner_losses: before each inner step, flags `[n]`.
        state, adapted: after 0..n inner steps, flags `[n+1]`.
        losses: the query loss, the meta-loss.
        grads: of the meta-parameters.
    """

    given: dict[str, Any]
    batches: dict[str, Any]
    inner_losses: dict[str, Any]
    state: dict[str, Any]
    adapted: dict[str, Any]
    losses: tuple[dict[str, Any], ...]
    grads: dict[str, Any]


@functools.partial(jax.jit, static_argnums=0)
def _flags(
    learner: MetaLearner, meta_params: MetaParams, task: Task, step: int, state: State
) -> _Flags:
    def view(adapted: Params, state: State) -> Any:
        return _finite(state), _finite(adapted)

    given = {"meta-parameter": meta_params, **task._asdict(), "state": state}
    trained = in_training(learner)
    states, adapted = trained.trace(meta_params, task.support, view, state=state)
    loss = lambda meta_params: learner.loss(meta_params, task, step=step, state=state)
    (meta_loss, info), grads = jax.value_and_grad(loss, has_aux=True)(meta_params)
    losses = info.inner_losses
    return _Flags(
        given={name: _finite(tree) for name, tree in given.items()},
        batches=_batches(learner, meta_params, task, state),
        inner_losses={} if losses is None else {"": jnp.isfinite(losses)},
        state=states,
        adapted=adapted,
        losses=(_finite({"query loss": info.query_loss}), _finite({"meta-loss": meta_loss})),
        grads=_finite(grads),
    )


def _batches(
    learner: MetaLearner, meta_params: MetaParams, task: Task, state: State
) -> dict[str, Any]:
    """The flags of the batches of the inner steps, if the learner makes them itself."""
    try:
        at_step = algorithm_of(learner).options.at_step
    except ValueError:  # no inner loop
        return {}
    if at_step is inner.fold_keys:
        return {}
    view = lambda params, state: params
    adapted = in_training(learner).trace(meta_params, task.support, view, state=state)
    before_each = jax.tree.map(lambda leaf: leaf[:-1], adapted)
    num_inner_steps = jax.tree.leaves(before_each)[0].shape[0]

    def flags(params: Params, i: Any) -> dict[str, Any]:
        # `jit` sorts a dict by its keys; numbers keep the order in which a batch is computed.
        found = _finite(at_step(params, task.support, i)[1])
        return {
            f"{number:0{_DIGITS}}{path}": flag for number, (path, flag) in enumerate(found.items())
        }

    return jax.vmap(flags)(before_each, jnp.arange(num_inner_steps))


def _finite(tree: Any) -> dict[str, Any]:
    """{path: whether the leaf is finite}; integers and keys are."""
    return {
        leaf_path(path): jnp.all(jnp.isfinite(leaf))
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _in_order(flags: _Flags) -> Iterator[tuple[str, bool]]:
    """(place, whether it is finite), in the order of computation."""
    for name in ("meta-parameter", "support", "query", "state"):
        yield from _named(name, flags.given[name])
    yield from _named("before the first inner step: parameter", _at(flags.adapted, 0))
    num_steps = len(next(iter(flags.adapted.values()), [()])) - 1
    for i in range(1, num_steps + 1):
        batch = {name[_DIGITS:]: flag for name, flag in _at(flags.batches, i - 1).items()}
        yield from _named(f"inner step {i}: batch", batch)
        yield from _named(f"inner step {i}: loss", _at(flags.inner_losses, i - 1))
        yield from _named(f"inner step {i}: state", _at(flags.state, i))
        yield from _named(f"inner step {i}: parameter", _at(flags.adapted, i))
    for losses in flags.losses:
        yield from _named("", losses)
    yield from _named("meta-gradient", flags.grads)


def _at(flags: dict[str, Any], index: int) -> dict[str, Any]:
    return {name: values[index] for name, values in flags.items()}


def _named(place: str, flags: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    return ((f"{place} {name}".strip(), finite) for name, finite in flags.items())
