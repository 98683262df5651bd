"""Proximal meta-policy search as an outer optimizer: several clipped steps per sample."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmaml import outer, trees
from jaxmaml.checks import check_count
from jaxmaml.rl.baselines import masked_mean
from jaxmaml.rl.collecting import collect, counted, mean_returns
from jaxmaml.rl.corrections import at_each_step, check_learner, corrected_loss
from jaxmaml.rl.problems import Experience, Problem, likelihood_ratio
from jaxmaml.types import Array, Info, MetaLearner, MetaParams, MetaState, Scalar, State, Task


@dataclasses.dataclass(frozen=True)
class Promp:
    """The outer optimizer that `promp` returns; its arguments are the attributes.

    Example:
        >>> import optax
        >>> from flax import nnx
        >>> from jaxmaml import rl
        >>> environment = rl.bandit(3)
        >>> policy_fn, _ = rl.policy(environment, hidden_sizes=(), rngs=nnx.Rngs(0))
        >>> rl.promp(rl.Problem(environment, policy_fn), optax.adam(1e-3)).num_epochs
        5
    """

    problem: Problem
    optimizer: optax.GradientTransformation
    num_epochs: int
    clip: float
    kl_penalty: float

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics of `meta_step`."""
        return *outer.METRICS, *("kl", "clipped", "return_before", "return")

    def init(self, params: MetaParams, /) -> optax.OptState:
        """Returns the state before the first step: that of the optax optimizer."""
        return self.optimizer.init(params)

    def meta_step(
        self, learner: MetaLearner, meta_state: MetaState, tasks: Task, /, **options: Any
    ) -> tuple[MetaState, dict[str, Array]]:
        """Samples, and makes the steps; see `promp`. The options are those of `jaxmaml.meta_step`."""
        _check_learner(learner)
        params, opt_state, step, state = meta_state
        tasks, parts = counted("promp", tasks, options)
        batches = collect(self.problem, learner, params, tasks)
        proximal = learner._replace(loss=functools.partial(_loss, self, learner))
        # What is measured is a part of the state of the loss: its mean over tasks comes with it.
        zero = jnp.zeros_like(batches.query.returns[0, 0])
        start = Measured(state, zero, zero)
        grad = functools.partial(outer.meta_grad, proximal, step=step, state=start, **options)

        optimizer = optax.with_extra_args_support(self.optimizer)

        def epoch(carry: Any, _: None) -> Any:
            params, opt_state = carry
            loss, grads, info = grad(params, batches)
            updates, opt_state = optimizer.update(grads, opt_state, params, value=loss)
            params = optax.apply_updates(params, updates)
            return (params, opt_state), (loss, parts @ info.query_loss, trees.norm(grads))

        carry = params, opt_state
        (params, opt_state), first = jax.lax.scan(epoch, carry, length=self.num_epochs)
        loss, query_loss, grad_norm = (values[0] for values in first)
        state, kl, clipped = grad(params, batches)[2].state
        metrics = {
            "loss": loss, "query_loss": query_loss, "grad_norm": grad_norm,
            "kl": kl, "clipped": clipped, **mean_returns(batches, parts),
        }  # fmt: skip
        return MetaState(params, opt_state, step + 1, state), metrics


def promp(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    *,
    num_epochs: int = 5,
    clip: float = 0.3,
    kl_penalty: float = 5e-4,
) -> Promp:
    """Returns proximal meta-policy search, as the outer optimizer of a learner with `rl.losses`.

    ProMP, Rothfuss et al. 2019 (arXiv 1810.06784, algorithm 1). Each outer step samples trajectories
    before and after adaptation, and holds them for several steps of an optax optimizer on

    - the clipped surrogate of the query (Schulman et al. 2017, arXiv 1707.06347, equation 7): the mean
      of min(r A, clip(r, 1 - clip, 1 + clip) A), where r is the likelihood ratio of the adapted policy
      to the one that sampled the query;
    - minus `kl_penalty` times the divergence of the policy before adaptation from the one that sampled
      the support. With several inner steps it is the mean over them, as in the authors' code: each
      step has a policy that sampled its support.

    Give the learner the paper's surrogate, `rl.losses(problem, inner="lvc")`: off the policy that
    sampled, it weights each step of the support by its likelihood ratio. It is also what credits the
    policy before adaptation for what it samples.

    Args:
        problem: that of the learner's losses.
        optimizer: any optax optimizer. The paper uses Adam with a rate of 1e-3.
        num_epochs: its steps per sample.
        clip: how far a likelihood ratio may move from 1.
        kl_penalty: the weight of the divergence.

    Returns:
        An outer optimizer for `jaxmaml.fit` and `jaxmaml.init_state`, whose state is that of the optax
        optimizer. Its metrics are those of `jaxmaml.meta_step` at the first epoch; where the step ends,
        "kl", the divergence above, and "clipped", the fraction of the steps of the query that the clip
        deprives of their gradient; and the mean undiscounted returns "return_before" and "return",
        before and after adaptation.

    Raises:
        TypeError: `num_epochs` is not an integer, or `optimizer` is not an optax optimizer.
        ValueError: a number is out of its range; in an outer step, a learner without an inner loop of
            jaxmaml, with `query_weights`, `test_loss_fn` or an annealed adjoint, or one of
            `rl.with_sampling_correction`, whose meta-loss would be lost.

    Example:
        >>> import jax, optax, jaxmaml
        >>> from flax import nnx
        >>> from jaxmaml import rl
        >>> environment = rl.navigation_2d()
        >>> policy_fn, params = rl.policy(environment, hidden_sizes=(8,), rngs=nnx.Rngs(0))
        >>> problem = rl.Problem(environment, policy_fn, num_trajectories=4, horizon=10)
        >>> parts, optimizer = rl.losses(problem, inner="lvc"), rl.promp(problem, optax.adam(1e-3))
        >>> options = {"query_loss_fn": parts.query_loss_fn, "at_step": parts.at_step}
        >>> learner = jaxmaml.maml(parts.loss_fn, optax.sgd(0.1), 1, **options)
        >>> state = jaxmaml.init_state(learner, optimizer, params)
        >>> source = rl.sampler(environment, num_tasks=3)
        >>> *_, (state, metrics) = jaxmaml.fit(
        ...     learner, optimizer, state, source, 2, key=jax.random.key(0)
        ... )
        >>> bool((metrics["kl"] > 0).all())
        True
    """
    check_count("num_epochs", num_epochs)
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"optimizer must be an optax optimizer; got {type(optimizer).__name__}")
    if not 0 < clip < math.inf:
        raise ValueError(f"clip must be a positive number; got {clip!r}")
    if not 0 <= kl_penalty < math.inf:
        raise ValueError(f"kl_penalty must be a finite number, 0 or more; got {kl_penalty!r}")
    return Promp(problem, optimizer, num_epochs, clip, kl_penalty)


class Measured(NamedTuple):
    """The state of the loss of `promp`.

    Attributes:
        state: that of the learner's own loss.
        kl: the divergence from the policies that sampled the support, `[]`.
        clipped: the fraction of the steps of the query without gradient, `[]`.
    """

    state: State
    kl: Array
    clipped: Array


def _loss(
    options: Promp,
    learner: MetaLearner,
    meta_params: MetaParams,
    task: Task,
    *,
    step: Scalar = 0,
    state: Measured,
) -> tuple[Array, Info]:
    """The clipped surrogate of the query, and the penalty."""
    del step
    adapted, info = learner.adapt(meta_params, task.support, state=state.state)
    query_loss, clipped = _clipped(options, adapted, task.query)

    def divergence(policy: Any, batch: Experience) -> Array:
        return masked_mean(batch.distribution.kl(policy), batch.mask)

    args = options.problem, learner, meta_params, task.support, state.state
    divergences = at_each_step(divergence, *args)
    kl = divergences.sum() / max(divergences.size, 1)
    loss = query_loss + options.kl_penalty * kl
    return loss, Info(query_loss, info.inner_losses, Measured(info.state, kl, clipped))


def _clipped(options: Promp, adapted: Any, query: Experience) -> tuple[Array, Array]:
    """(the negative clipped surrogate, the fraction of the steps that have no gradient)."""
    ratio = likelihood_ratio(options.problem.policy_fn, adapted, query)
    gain = ratio * query.advantages
    bound = jnp.clip(ratio, 1 - options.clip, 1 + options.clip) * query.advantages
    return -masked_mean(jnp.minimum(gain, bound), query.mask), masked_mean(bound < gain, query.mask)


def _check_learner(learner: MetaLearner) -> None:
    """Raises ValueError for a learner whose meta-loss is not the query loss after adaptation."""
    if getattr(learner.loss, "func", None) is corrected_loss:
        raise ValueError("promp has its own meta-loss: make the learner without the correction")
    check_learner("promp", learner)
