"""RL²: a learner that adapts by remembering, without an inner optimizer."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmaml.checks import check_count
from jaxmaml.rl.baselines import masked_mean
from jaxmaml.rl.environments import Environment, check_observation
from jaxmaml.rl.recurrent import Memory, WithMemory
from jaxmaml.rl.requests import Request
from jaxmaml.rl.trials import RecurrentProblem, TrialExperience, episode_keys
from jaxmaml.types import Array, Info, MetaLearner, MetaParams, Params, Scalar, State, Task, View


class Algorithm(NamedTuple):
    """The arguments of `rl_squared`, which are the attributes."""

    problem: RecurrentProblem
    clip: float
    value_weight: float
    entropy_weight: float


def rl_squared(
    problem: RecurrentProblem,
    *,
    clip: float = 0.2,
    value_weight: float = 0.5,
    entropy_weight: float = 0.0,
) -> MetaLearner:
    """Returns RL²: Duan et al. 2016 (arXiv 1611.02779); also Wang et al. 2016 (arXiv 1611.05763).

    A recurrent policy plays several episodes of a task and keeps its memory. It is trained for the
    rewards of whole trials, so that it learns to explore, and to use what it has seen. An inner step is
    an episode: `adapt` plays episodes, and adapts the memory and not the parameters. `evaluate` with
    `problem.metric_fn` gives the return of the first episode, and of the one after each inner step.

    The meta-loss of a task is the surrogate of PPO (Schulman et al. 2017, arXiv 1707.06347, equation 9)
    over the steps of its trials: minus the clipped ratio of likelihoods times the advantages, plus half
    the squared error of the values, minus the entropy. Errors are relative to the discounted return of
    a trial with rewards of 1, so that long trials need no other weight. The gradient where the trials
    were played is the policy gradient, so that any optax optimizer can be the outer one; `rl.ppo` makes
    several steps on the same trials, and learns better. (The paper's outer optimizer is TRPO.)

    Tasks are those of `rl.sampler`. The trial of a task is one episode for each inner step, from the
    support, and a last one from the query. A query may also be a `TrialExperience`: then nothing is
    played. In the `Info`, `inner_losses` and `query_loss` are minus the mean undiscounted returns of
    these episodes.

    Args:
        problem: what is played.
        clip: how far from 1 a ratio of likelihoods counts.
        value_weight: the weight of the error of the values.
        entropy_weight: the weight of the entropy of the actions.

    Returns:
        A learner with `num_episodes - 1` inner steps. Its adapted parameters are a `WithMemory`.

    Raises:
        TypeError: a count of the problem is not an integer.
        ValueError: a count is less than 1, a weight negative, or an observation has another size than
            the environment says.

    Example:
        >>> import jax, optax, jaxmaml
        >>> from flax import nnx
        >>> from jaxmaml import rl
        >>> environment = rl.bandit(5)
        >>> policy, params = rl.recurrent_policy(environment, hidden_size=8, rngs=nnx.Rngs(0))
        >>> problem = rl.RecurrentProblem(environment, policy, num_episodes=3, horizon=10)
        >>> learner, optimizer = rl.rl_squared(problem), rl.ppo(optax.adam(1e-2))
        >>> state = jaxmaml.init_state(learner, optimizer, params)
        >>> source, key = rl.sampler(environment, num_tasks=16), jax.random.key(0)
        >>> *_, (state, metrics) = jaxmaml.fit(learner, optimizer, state, source, 2, key=key)
        >>> returns = jaxmaml.evaluate(
        ...     learner, problem.metric_fn, state, source, num_tasks=20, key=key
        ... )
        >>> returns.shape
        (20, 3)
    """
    for name in ("num_episodes", "num_trajectories", "horizon"):
        check_count(name, getattr(problem, name))
    _check_observations(problem.environment)
    if not clip > 0:
        raise ValueError(f"clip must be positive; got {clip!r}")
    for name, weight in {"value_weight": value_weight, "entropy_weight": entropy_weight}.items():
        if not weight >= 0:
            raise ValueError(f"{name} must be 0 or more; got {weight!r}")
    algorithm = Algorithm(problem, clip, value_weight, entropy_weight)
    return MetaLearner(
        init=lambda params: params,
        adapt=functools.partial(_adapt, problem),
        trace=functools.partial(_trace, problem),
        loss=functools.partial(_loss, algorithm),
    )


def problem_of(learner: MetaLearner) -> RecurrentProblem:
    """Returns what `rl_squared` made a learner from.

    Raises:
        ValueError: the learner was not made by `rl_squared`.
    """
    loss = learner.loss
    if isinstance(loss, functools.partial) and loss.args[:1]:
        algorithm = loss.args[0]
        if isinstance(algorithm, Algorithm):
            return algorithm.problem
    raise ValueError("the learner must be one of rl.rl_squared: others play no trials")


def _adapt(
    problem: RecurrentProblem,
    meta_params: MetaParams,
    support: Request,
    *,
    state: State = (),
    num_inner_steps: int | None = None,
) -> tuple[WithMemory, Info]:
    keys = _keys(problem, support, num_inner_steps)
    memory, found = problem.play(meta_params, problem.start(meta_params), support.task, keys)
    return WithMemory(meta_params, memory), Info(None, -found.returns().mean(axis=0), state)


def _trace(
    problem: RecurrentProblem,
    meta_params: MetaParams,
    support: Request,
    view: View,
    *,
    state: State = (),
    num_inner_steps: int | None = None,
) -> Any:
    seen = lambda memory: view(WithMemory(meta_params, memory), state)

    def further(memory: Memory, key: Array) -> tuple[Memory, Any]:
        memory, _ = problem.play(meta_params, memory, support.task, key[None])
        return memory, seen(memory)

    start, keys = problem.start(meta_params), _keys(problem, support, num_inner_steps)
    _, later = jax.lax.scan(further, start, keys)
    join = lambda first, rest: jnp.concatenate([jnp.asarray(first)[None], rest])
    return jax.tree.map(join, seen(start), later)


def _loss(
    algorithm: Algorithm,
    meta_params: MetaParams,
    task: Task,
    *,
    step: Scalar = 0,
    state: State = (),
) -> tuple[Array, Info]:
    del step
    batch = task.query
    if isinstance(batch, Request):
        batch = algorithm.problem.experience(meta_params, task)
    losses = -batch.trials.returns().mean(axis=0)
    return _surrogate(algorithm, meta_params, batch), Info(losses[-1], losses[:-1], state)


def _surrogate(algorithm: Algorithm, params: Params, batch: TrialExperience) -> Array:
    """The loss of PPO, the mean over the steps of the trials in a task."""
    _, clip, value_weight, entropy_weight = algorithm
    trials, advantages = batch.trials, batch.advantages
    log_probs, values, entropies = algorithm.problem.replay(params, trials)
    # The ratio after the end, which has no meaning, must not overflow: a mask would make it NaN.
    ratios = jnp.exp(jnp.where(trials.mask > 0, log_probs - trials.log_probs, 0))
    clipped = jnp.clip(ratios, 1 - clip, 1 + clip)
    gains = jnp.minimum(ratios * advantages, clipped * advantages) + entropy_weight * entropies
    errors = jnp.square((values - batch.targets) / _size(algorithm.problem)) / 2
    return masked_mean(value_weight * errors - gains, trials.mask)


def _size(problem: RecurrentProblem) -> Array:
    """The discounted return of a trial with rewards of 1."""
    return jnp.power(problem.discount, jnp.arange(problem.num_episodes * problem.horizon)).sum()


def _keys(problem: RecurrentProblem, support: Request, num_inner_steps: int | None) -> Array:
    if num_inner_steps is None:
        num_inner_steps = problem.num_episodes - 1
    return episode_keys(support, check_count("num_inner_steps", num_inner_steps, minimum=0))


def _check_observations(environment: Environment) -> None:
    def first(key: Array) -> Array:
        return environment.reset(key, environment.sample_task(key))[1]

    check_observation(environment, jax.eval_shape(first, jax.random.key(0)).shape)
