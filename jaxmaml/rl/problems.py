"""Losses of a policy, which sample what they need, for any learner."""

from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jaxmaml.checks import check_choice
from jaxmaml.rl import baselines
from jaxmaml.rl.baselines import masked_mean
from jaxmaml.rl.environments import Environment
from jaxmaml.rl.policies import PolicyFn
from jaxmaml.rl.requests import Request
from jaxmaml.rl.rollouts import Trajectories, rollout
from jaxmaml.rl.surrogates import Inner, surrogate
from jaxmaml.types import Array, AtStep, LossFn, MetricFn, Params, Scalar


class Experience(NamedTuple):
    """A batch that was sampled, with what its losses need.

    Attributes:
        observations, actions, rewards, log_probs, mask: as in `Trajectories`.
        distribution: of the actions, under the policy that chose them.
        advantages: `[num_trajectories, horizon]`, see `rl.advantages`.
        scale: what the advantages were divided by, `[]`; 1 if they are not normalized.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxmaml import rl
        >>> environment = rl.navigation_2d()
        >>> policy_fn, params = rl.policy(environment, rngs=nnx.Rngs(0))
        >>> request = rl.Request(jax.random.key(0), jnp.ones(2) / 4)
        >>> rl.Problem(environment, policy_fn).experience(params, request).advantages.shape
        (20, 100)
    """

    observations: Array
    actions: Array
    rewards: Array
    log_probs: Array
    distribution: Any
    advantages: Array
    mask: Array
    scale: Array

    @property
    def returns(self) -> Array:
        """The undiscounted return of each trajectory, `[..., num_trajectories]`."""
        return self.rewards.sum(axis=-1)


SampledBatch: TypeAlias = Request | Experience
"""A batch that is sampled when it is needed, or that was sampled before."""
Baseline: TypeAlias = Literal["linear", "none"]
"""The name of the values that are subtracted from the returns; see `Problem`."""


class Problem(NamedTuple):
    """An environment and a policy, with the numbers that say how experience is sampled and scored.

    Attributes:
        environment: the environment.
        policy_fn: `(params, observations) -> distribution`.
        num_trajectories: the trajectories of a batch.
        horizon: the steps after which an episode is cut.
        discount: of rewards, in 0..1.
        gae_lambda: of the advantages, see `rl.advantages`.
        normalize: whether the advantages of a batch are normalized, see `rl.advantages`. Without it, a
            discount and a lambda of 1 and the baseline "none", the policy gradient is unbiased.
        baseline: "linear" for `rl.linear_baseline`, or "none". The linear one is fitted to the
            trajectories that it serves, a bias that vanishes with their number.

    Example:
        >>> from flax import nnx
        >>> from jaxmaml import rl
        >>> environment = rl.navigation_2d()
        >>> policy_fn, params = rl.policy(environment, rngs=nnx.Rngs(0))
        >>> rl.Problem(environment, policy_fn).num_trajectories
        20
    """

    environment: Environment
    policy_fn: PolicyFn
    num_trajectories: int = 20
    horizon: int = 100
    discount: float = 0.99
    gae_lambda: float = 1.0
    normalize: bool = True
    baseline: Baseline = "linear"

    def sample(self, params: Params, request: Request) -> Trajectories:
        """Returns trajectories of the policy. They are constants: nothing is differentiated."""
        params = jax.lax.stop_gradient(params)
        found = rollout(
            self.environment, self.policy_fn, params, request.task, request.key,
            num_trajectories=self.num_trajectories, horizon=self.horizon,
        )  # fmt: skip
        return jax.lax.stop_gradient(found)

    def experience(self, params: Params, request: Request) -> Experience:
        """Returns trajectories of the policy with their advantages; see `score`."""
        return self.score(params, self.sample(params, request))

    def score(self, params: Params, found: Trajectories) -> Experience:
        """Returns trajectories, which a policy sampled, with their advantages.

        Args:
            params: those that the trajectories were sampled with.
            found: the trajectories of one task.

        Raises:
            ValueError: `baseline` is unknown.
        """
        values, scale = self._values(found), jnp.ones_like(found.rewards[0, 0])
        advantages = baselines.advantages(
            found, values, discount=self.discount, gae_lambda=self.gae_lambda, normalize=False
        )
        if self.normalize:
            advantages, scale = baselines.normalized(advantages, values, found.mask)
        distribution = self.policy_fn(params, found.observations)
        batch = Experience(
            found.observations, found.actions, found.rewards, found.log_probs, distribution,
            advantages, found.mask, scale,
        )  # fmt: skip
        return jax.lax.stop_gradient(batch)

    def _values(self, found: Trajectories) -> Array:
        check_choice("baseline", self.baseline, get_args(Baseline))
        if self.baseline == "none":
            return jnp.zeros_like(found.rewards)
        return baselines.linear_baseline(found, self.discount)

    def experience_at(self, params: Params, request: Request, step: Scalar) -> Experience:
        """Returns the experience of an inner step, which has a key of its own."""
        key = jax.random.fold_in(request.key, step)
        return self.experience(params, request._replace(key=key))


class Losses(NamedTuple):
    """The functions that make a learner of `jaxmaml` a learner of a policy.

    Attributes:
        loss_fn: the surrogate of the inner loop.
        query_loss_fn: the surrogate with the ratio of likelihoods, whose gradient where the query was
            sampled is the policy gradient.
        at_step: samples the support of an inner step with the parameters of that step.
        metric_fn: the mean undiscounted return of the adapted parameters.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from jaxmaml import rl
        >>> environment = rl.bandit(5)
        >>> policy_fn, params = rl.policy(environment, hidden_sizes=(), rngs=nnx.Rngs(0))
        >>> parts = rl.losses(rl.Problem(environment, policy_fn, horizon=10))
        >>> request = rl.Request(jax.random.key(0), environment.sample_task(jax.random.key(1)))
        >>> 0 <= float(parts.metric_fn(params, request)) <= 10
        True
    """

    loss_fn: LossFn
    query_loss_fn: LossFn
    at_step: AtStep
    metric_fn: MetricFn


def losses(problem: Problem, *, inner: Inner = "reinforce") -> Losses:
    """Returns what a learner needs in order to adapt a policy by policy gradients.

    Tasks are `Task(support=Request(...), query=Request(...))`, as `rl.sampler` draws them. Before each
    inner step, `at_step` samples trajectories with the current parameters (Finn, Abbeel and Levine
    2017, arXiv 1703.03400, algorithm 3). A support may also be an `Experience` whose leaves have a
    leading axis of inner steps, and a query an `Experience`: then nothing is sampled.

    Trajectories are constants to the derivative, so that the exact meta-gradient leaves out that the
    initial parameters also decide what is sampled for the inner loop. `rl.with_sampling_correction`
    adds this term to the surrogate "reinforce", which is the estimator of the MAML paper. "dice" and
    "lvc" contain it, or a part of it, to first order in the inner rate: see `rl.surrogate`.

    All losses are means over the steps that count. The gradient of the expected return is that of a
    sum over steps: it is larger by the mean length of an episode, `horizon` where none ends early.

    Args:
        problem: what is sampled.
        inner: the surrogate of the inner loop, "reinforce", "lvc" or "dice"; see `rl.surrogate`.

    Raises:
        ValueError: `inner` is unknown.

    Example:
        >>> import jax, optax, jaxmaml
        >>> from flax import nnx
        >>> from jaxmaml import rl
        >>> environment = rl.navigation_2d()
        >>> policy_fn, params = rl.policy(environment, hidden_sizes=(8,), rngs=nnx.Rngs(0))
        >>> parts = rl.losses(rl.Problem(environment, policy_fn, num_trajectories=4, horizon=10))
        >>> learner = jaxmaml.maml(
        ...     parts.loss_fn, optax.sgd(0.1), 1,
        ...     query_loss_fn=parts.query_loss_fn, at_step=parts.at_step,
        ... )
        >>> tasks = rl.sampler(environment, num_tasks=3)(jax.random.key(0))
        >>> loss, grads, info = jaxmaml.meta_grad(learner, params, tasks)
        >>> state = jaxmaml.init_state(learner, optax.sgd(0.1), params)
        >>> jaxmaml.evaluate(learner, parts.metric_fn, state, tasks).shape
        (3, 2)
    """
    check_choice("inner", inner, get_args(Inner))

    def loss_fn(params: Params, batch: Experience) -> Array:
        log_probs = problem.policy_fn(params, batch.observations).log_prob(batch.actions)
        return -surrogate(inner, log_probs, batch.log_probs, batch.advantages, batch.mask)

    def query_loss_fn(params: Params, batch: SampledBatch) -> Array:
        if isinstance(batch, Request):
            batch = problem.experience(params, batch)
        return -masked_mean(
            likelihood_ratio(problem.policy_fn, params, batch) * batch.advantages, batch.mask
        )

    def at_step(params: Params, batch: Any, step: Scalar) -> tuple[Params, Experience]:
        if isinstance(batch, Request):
            return params, problem.experience_at(params, batch, step)
        # After the last step it is called once more, for the parameters alone. A batch must not stand
        # for later steps, whose trajectories are others: then its loss is NaN.
        num_batches = batch.mask.shape[0]
        found = jax.tree.map(lambda leaf: leaf[jnp.minimum(step, num_batches - 1)], batch)
        advantages = jnp.where(step < num_batches, found.advantages, jnp.nan)
        return params, found._replace(advantages=advantages)

    def metric_fn(adapted: Params, query: Request) -> Array:
        return problem.sample(adapted, query).returns().mean()

    return Losses(loss_fn, query_loss_fn, at_step, metric_fn)


def likelihood_ratio(policy_fn: PolicyFn, params: Params, batch: Experience) -> Array:
    """Returns the likelihood of each action relative to that under the policy that chose it.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmaml import rl
        >>> policy_fn = lambda params, observations: rl.Categorical(params * observations)
        >>> actions, log_probs = jnp.zeros((1, 1), int), jnp.log(jnp.full((1, 1), 0.25))
        >>> ones = jnp.ones((1, 1))
        >>> batch = rl.Experience(
        ...     jnp.ones((1, 1, 2)), actions, ones, log_probs, None, ones, ones, ones[0, 0]
        ... )
        >>> likelihood_ratio(policy_fn, 1.0, batch).tolist()
        [[2.0]]
    """
    log_probs = policy_fn(params, batch.observations).log_prob(batch.actions)
    # What comes after the end of an episode may not become infinite.
    return jnp.exp(jnp.where(batch.mask > 0, log_probs - batch.log_probs, 0))
