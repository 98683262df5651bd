"""Sampling the batches of an outer step, which then stay the same while the parameters move."""

from typing import Any

import jax
import jax.numpy as jnp

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
    info = jax.eval_shape(learner.loss, meta_params, task)[1]
    num_inner_steps = info.inner_losses.shape[0]
    # The first step samples with what the learner starts from, each later one with what the batches
    # before it lead to.
    sampled: list[Experience] = []
    for step in range(num_inner_steps):
        support = _stacked(sampled, num_inner_steps) if sampled else task.support
        adapted, _ = learner.adapt(meta_params, support, num_inner_steps=step)
        sampled.append(problem.experience_at(adapted, task.support, step))
    support = _stacked(sampled, num_inner_steps)
    adapted, _ = learner.adapt(meta_params, support)
    return Task(support, problem.experience(adapted, task.query))


def shares(weights: Any, batches: Task) -> Array:
    """Returns the part of each task in a mean over tasks, `[num_tasks]`.

    Args:
        weights: of the tasks, `[num_tasks]`; None for equal ones.
        batches: what `collect` returns.
    """
    returns = batches.query.returns
    weights = jnp.ones(len(returns)) if weights is None else weights
    weights = jnp.asarray(weights, returns.dtype)
    return weights / weights.sum()


def _stacked(sampled: list[Experience], num_inner_steps: int) -> Experience:
    """The batches with a leading axis of inner steps; the last one stands for those to come."""
    sampled = sampled + sampled[-1:] * (num_inner_steps - len(sampled))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *sampled)
