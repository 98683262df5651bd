"""The sampling correction of E-MAML: the initial policy is also credited for what it samples."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmaml.adjoints import Annealed
from jaxmaml.learners.inner_loop import algorithm_of, has_query_loss
from jaxmaml.rl.collecting import collect_one
from jaxmaml.rl.problems import Experience, Problem
from jaxmaml.rl.requests import Request
from jaxmaml.types import Array, Info, MetaLearner, MetaParams, Scalar, State, Task


def with_sampling_correction(problem: Problem, learner: MetaLearner) -> MetaLearner:
    """Returns a learner whose meta-gradient includes the derivative of what its inner loop samples.

    The expected return after adaptation depends on the initial parameters in two ways: through the
    inner gradients, and through the trajectories that they are estimated from. Stadie et al. 2018
    (arXiv 1803.01118), and Al-Shedivat et al. 2018 (arXiv 1710.03641, equation 7) for several steps,
    add the second one: the sum over inner steps of the log-likelihood of the support of that step
    under the parameters of that step, times the return of the query. The log-likelihood is
    differentiated through the inner loop.

    With the surrogate "reinforce" and an exact adjoint, the expected meta-gradient is then that of the
    expected return after adaptation, for any number of inner steps and trajectories, and whatever the
    advantages of the support are, normalized ones too. "lvc" and "dice" contain a part of the same
    effect, which would count twice. The advantages of the query must have no bias themselves: see
    `Problem`, whose normalization takes off a mean of the same trajectories. With `FirstOrder`, the
    inner gradients are constants in both terms: exact for the new term if there is one inner step.

    The return of the query counts relative to the mean return of the other trajectories of the support
    of that step. This control variate has no bias: given the parameters of the step, its trajectories
    are independent. A single trajectory has none. Even so, the new term has by far the larger variance
    of the two, and it does not fall with the number of trajectories of the support.

    The meta-loss is the query loss in units of the reward, as a mean over steps: the normalization of
    the query's advantages is undone, so that a return has the same units in both terms. Where the
    batches were sampled, the new term is 0. Where no episode ends early, the meta-gradient is that of
    the negative expected return divided by the horizon. Otherwise, means over steps divide by random
    lengths in both terms.

    Args:
        problem: that of the learner's losses.
        learner: a learner with the losses of `rl.losses(problem)`.

    Returns:
        The learner with another `loss`. It takes `Request`s, which it samples once, and what
        `rl.collect` returns.

    Raises:
        ValueError: a learner without an inner loop of jaxmaml, or with `query_weights`, `test_loss_fn`
            or an annealed adjoint; when called, a support without a batch for each inner step.
        TypeError: when called, a support that is sampled and a query that is not, or the opposite.

    Example:
        >>> import jax, optax, jaxmaml
        >>> from flax import nnx
        >>> from jaxmaml import rl
        >>> environment = rl.navigation_2d()
        >>> policy_fn, params = rl.policy(environment, hidden_sizes=(8,), rngs=nnx.Rngs(0))
        >>> problem = rl.Problem(environment, policy_fn, num_trajectories=4, horizon=10)
        >>> parts = rl.losses(problem)
        >>> options = {"query_loss_fn": parts.query_loss_fn, "at_step": parts.at_step}
        >>> learner = jaxmaml.maml(parts.loss_fn, optax.sgd(0.1), 1, **options)
        >>> corrected = rl.with_sampling_correction(problem, learner)
        >>> tasks = rl.sampler(environment, num_tasks=3)(jax.random.key(0))
        >>> loss, grads, info = jaxmaml.meta_grad(corrected, params, tasks)
        >>> info.query_loss.shape
        (3,)
    """
    check_learner("with_sampling_correction", learner)
    return learner._replace(loss=functools.partial(corrected_loss, problem, learner))


def corrected_loss(
    problem: Problem,
    learner: MetaLearner,
    meta_params: MetaParams,
    task: Task,
    *,
    step: Scalar = 0,
    state: State = (),
) -> tuple[Array, Info]:
    """Returns the meta-loss of `with_sampling_correction`, of one task.

    Args:
        problem, learner: see `with_sampling_correction`.
        meta_params, task, step, state: see `MetaLearner.loss`.
    """
    is_request = [isinstance(batch, Request) for batch in task]
    if any(is_request) and not all(is_request):
        raise TypeError("the support and the query must both be a Request, or both an Experience")
    if all(is_request):
        task = collect_one(problem, learner, jax.lax.stop_gradient(meta_params), task)
    loss, info = learner.loss(meta_params, task, step=step, state=state)
    _check_support(task.support, info)

    def log_ratio(policy: Any, batch: Experience) -> Array:
        log_ratios = policy.log_prob(batch.actions) - batch.log_probs
        return jnp.sum(log_ratios * batch.mask, axis=1)

    by_trajectory = at_each_step(log_ratio, problem, learner, meta_params, task.support, state)
    correction = jnp.sum(by_trajectory * _credit(task))
    return task.query.scale * loss - correction, info


def at_each_step(
    fn: Callable[[Any, Experience], Array],
    problem: Problem,
    learner: MetaLearner,
    meta_params: MetaParams,
    support: Experience,
    state: State,
) -> Array:
    """Returns a function of the policy and the support of each inner step, `[num_inner_steps, ...]`.

    It is differentiated through the inner loop.

    Args:
        fn: `(distribution, batch) -> array`, where the distribution is that of the actions at the
            observations of the batch, before the inner step.
        problem: has the policy.
        learner: a learner with an inner loop.
        meta_params: its meta-parameters.
        support: leaves `[num_inner_steps, ...]`.
        state: that of the loss.
    """
    params = learner.trace(meta_params, support, lambda adapted, state: adapted, state=state)
    before_each = jax.tree.map(lambda leaf: leaf[:-1], params)
    num_inner_steps = jax.tree.leaves(before_each)[0].shape[0]
    support = jax.tree.map(lambda leaf: leaf[:num_inner_steps], support)
    at_step = lambda params, batch: fn(problem.policy_fn(params, batch.observations), batch)
    return jax.vmap(at_step)(before_each, support)


def check_learner(name: str, learner: MetaLearner) -> None:
    """Raises ValueError unless the meta-loss is the query loss after an inner loop like `adapt`'s.

    It is another one with Reptile, and after a correction.

    Args:
        name: what needs it, for the message.
        learner: the learner.
    """
    options = algorithm_of(learner).options
    if not has_query_loss(learner):
        raise ValueError(f"{name} takes only learners whose meta-loss is the query loss")
    refused = {
        "query_weights": options.query_weights is not None,
        "test_loss_fn": options.test_loss_fn is not None,
        "an annealed adjoint": isinstance(options.adjoint, Annealed),
    }
    for option, is_used in refused.items():
        if is_used:
            raise ValueError(f"{name} takes no learner with {option}: make it without")


def _credit(task: Task) -> Array:
    """The credit of each trajectory of the support, `[num_inner_steps, num_trajectories]`.

    It is the mean return of the query above that of the other trajectories of the step, per step of an
    episode of the query.
    """
    support, query = task
    others = jnp.sum(support.returns, axis=1, keepdims=True) - support.returns
    baseline = others / max(support.returns.shape[1] - 1, 1)
    mean_length = jnp.maximum(query.mask.sum() / query.mask.shape[0], 1)
    return jax.lax.stop_gradient((query.returns.mean() - baseline) / mean_length)


def _check_support(support: Experience, info: Info) -> None:
    found, wanted = support.mask.shape[0], max(info.inner_losses.shape[0], 1)
    if support.mask.ndim != 3 or found != wanted:
        raise ValueError(
            f"the support must have a batch for each of the {wanted} inner steps; its mask has shape "
            f"{list(support.mask.shape)}"
        )
