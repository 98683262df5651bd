"""Sampling the batches of an outer step, which then stay the same while the parameters move."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmaml.batching import check_tasks, check_weights, with_stand_ins
from jaxmaml.learners.inner_loop import in_training
from jaxmaml.rl.problems import Experience, Problem
from jaxmaml.types import Array, MetaLearner, MetaParams, Task


def collect(problem: Problem, learner: MetaLearner, meta_params: MetaParams, tasks: Task) -> Task:
    """Returns what a learner samples in some tasks: along its inner loop, and after it.

    Args:
        problem: that of the learner's losses.
        learner: a learner with the losses of `rl.losses(problem)`.
        meta_params: its meta-parameters.
        tasks: `Request`s with a leading task axis.

    Returns:
        `Task(support, query)` of `Experience`, leaves `[num_tasks, num_inner_steps, ...]` and
        `[num_tasks, ...]`. `learner.loss` takes them in place of the requests, and samples nothing.

    Example:
        >>> import jax, optax, jaxmaml
        >>> from flax import nnx
        >>> from jaxmaml import rl
        >>> environment = rl.navigation_2d()
        >>> policy_fn, params = rl.policy(environment, hidden_sizes=(8,), rngs=nnx.Rngs(0))
        >>> problem = rl.Problem(environment, policy_fn, num_trajectories=4, horizon=10)
        >>> parts = rl.losses(problem)
        >>> options = {"query_loss_fn": parts.query_loss_fn, "at_step": parts.at_step}
        >>> learner = jaxmaml.maml(parts.loss_fn, optax.sgd(0.1), 2, **options)
        >>> tasks = rl.sampler(environment, num_tasks=3)(jax.random.key(0))
        >>> found = rl.collect(problem, learner, params, tasks)
        >>> found.support.actions.shape, found.query.actions.shape
        ((3, 2, 4, 10, 2), (3, 4, 10, 2))
    """
    return jax.vmap(lambda task: collect_one(problem, learner, meta_params, task))(tasks)


def collect_one(
    problem: Problem, learner: MetaLearner, meta_params: MetaParams, task: Task
) -> Task:
    """Returns the batches of one task; see `collect`."""
    learner = in_training(learner)
    info = jax.eval_shape(learner.loss, meta_params, task)[1]
    # Without inner steps there is one batch of the policy before adaptation, which nothing adapts to.
    num_batches = max(info.inner_losses.shape[0], 1)
    # The first step samples with what the learner starts from, each later one with what the batches
    # before it lead to.
    sampled: list[Experience] = []
    for step in range(num_batches):
        support = _stacked(sampled, num_batches) if sampled else task.support
        adapted, _ = learner.adapt(meta_params, support, num_inner_steps=step)
        sampled.append(problem.experience_at(adapted, task.support, step))
    support = _stacked(sampled, num_batches)
    adapted, _ = learner.adapt(meta_params, support)
    return Task(support, problem.experience(adapted, task.query))


class Counted(NamedTuple):
    """The tasks of an outer step that makes its own means.

    Attributes:
        tasks: the tasks. One that counts stands in for each that has no weight.
        parts: the part of each task in a mean over tasks, `[num_tasks]`.
    """

    tasks: Task
    parts: Array


def counted(name: str, tasks: Task, options: dict[str, Any]) -> Counted:
    """Returns tasks as the options of an outer step weight them.

    Args:
        name: of the outer optimizer, for the message.
        tasks: those of the step.
        options: those of `jaxmaml.meta_step`.

    Raises:
        ValueError: an `axis_name`, whose means this program would not share with other devices; or
            wrong weights.
    """
    if options.get("axis_name") is not None:
        raise ValueError(f"{name} takes no axis_name: give it the mesh")
    num_tasks, weights = check_tasks(tasks), options.get("weights")
    if weights is None:
        return Counted(tasks, jnp.full(num_tasks, 1 / num_tasks))
    weights = check_weights(weights, num_tasks)
    return Counted(with_stand_ins(tasks, weights), weights / weights.sum())


def mean_returns(batches: Task, parts: Array) -> dict[str, Array]:
    """Returns the mean undiscounted returns before and after adaptation, as metrics."""
    return {
        "return_before": parts @ batches.support.returns[:, 0].mean(axis=1),
        "return": parts @ batches.query.returns.mean(axis=1),
    }


def _stacked(sampled: list[Experience], num_batches: int) -> Experience:
    """The batches with a leading axis of inner steps; the last one stands for those to come."""
    sampled = sampled + sampled[-1:] * (num_batches - len(sampled))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *sampled)
