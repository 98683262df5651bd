"""Proximal policy optimization as an outer optimizer: several steps on the same trials."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmaml import outer
from jaxmaml.checks import check_count
from jaxmaml.rl.collecting import counted
from jaxmaml.rl.remembering import problem_of
from jaxmaml.rl.trials import TrialExperience
from jaxmaml.types import Array, MetaLearner, MetaParams, MetaState, Task


@dataclasses.dataclass(frozen=True)
class Ppo:
    """The outer optimizer that `ppo` returns; its arguments are the attributes.

    Example:
        >>> import optax
        >>> from jaxmaml import rl
        >>> rl.ppo(optax.adam(1e-3), num_epochs=3).num_epochs
        3
    """

    optimizer: optax.GradientTransformation
    num_epochs: int

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics of `meta_step`."""
        return *outer.METRICS, *("return_before", "return", "trial_return")

    def init(self, params: MetaParams, /) -> Any:
        """Returns the state of the optax optimizer."""
        return self.optimizer.init(params)

    def meta_step(
        self, learner: MetaLearner, meta_state: MetaState, tasks: Task, /, **options: Any
    ) -> tuple[MetaState, dict[str, Array]]:
        """Plays trials and makes one outer step; see `ppo`. The options are those of `meta_step`."""
        problem = problem_of(learner)
        play = lambda task: problem.experience(meta_state.params, task)
        tasks, parts = counted("ppo", tasks, options)
        batch = _normalized(jax.vmap(play)(tasks), parts)

        def epoch(current: MetaState, _: None) -> tuple[MetaState, dict[str, Array]]:
            following, metrics = outer.meta_step(
                learner, self.optimizer, current, Task((), batch), **options
            )
            return following._replace(step=current.step), metrics

        meta_state, metrics = jax.lax.scan(epoch, meta_state, length=self.num_epochs)
        metrics = jax.tree.map(lambda rows: rows[0], metrics)
        return meta_state._replace(step=meta_state.step + 1), metrics | _returns(batch, parts)


def ppo(optimizer: optax.GradientTransformation, *, num_epochs: int = 5) -> Ppo:
    """Returns proximal policy optimization, as the outer optimizer of `rl.rl_squared`.

    Each outer step plays the trials of all tasks, and then makes `num_epochs` steps of an optax
    optimizer on their loss, which the learner clips (Schulman et al. 2017, arXiv 1707.06347, algorithm
    1). Their mean over all trials at the same step is taken off the advantages, which needs several
    tasks; then the advantages are divided by their standard deviation.

    Args:
        optimizer: the optax optimizer. A schedule of its learning rate counts epochs.
        num_epochs: its steps per outer step, each on all trials.

    Returns:
        An outer optimizer for `jaxmaml.fit` and `jaxmaml.init_state`. Its metrics are those of
        `jaxmaml.meta_step` in the first epoch, and the mean undiscounted returns "return_before" and
        "return", of the first and the last episode, and "trial_return", of all episodes together.

    Raises:
        TypeError: `num_epochs` is not an integer.
        ValueError: `num_epochs` is less than 1; in an outer step, a learner that is not one of
            `rl.rl_squared`.

    Example:
        >>> import jax, optax, jaxmaml
        >>> from flax import nnx
        >>> from jaxmaml import rl
        >>> environment = rl.bandit(2)
        >>> policy, params = rl.recurrent_policy(environment, hidden_size=4, rngs=nnx.Rngs(0))
        >>> learner = rl.rl_squared(rl.RecurrentProblem(environment, policy, horizon=5))
        >>> optimizer = rl.ppo(optax.adam(1e-2), num_epochs=2)
        >>> state = jaxmaml.init_state(learner, optimizer, params)
        >>> source = rl.sampler(environment, num_tasks=8)
        >>> *_, (state, metrics) = jaxmaml.fit(
        ...     learner, optimizer, state, source, 3, key=jax.random.key(0)
        ... )
        >>> metrics["trial_return"].shape, int(state.step)
        ((3,), 3)
    """
    return Ppo(optimizer, check_count("num_epochs", num_epochs))


def _normalized(batch: TrialExperience, parts: Array) -> TrialExperience:
    """The batch of all tasks, with advantages of mean zero at each step, and deviation one."""
    share = parts[:, None, None, None] * batch.trials.mask
    # The values do not know when a trial ends, and all of them are far too large at its last steps.
    over_trials = lambda leaf: leaf.sum(axis=(0, 1))
    means = over_trials(batch.advantages * share) / jnp.maximum(
        over_trials(share), jnp.finfo(share.dtype).tiny
    )
    offset = (batch.advantages - means) * batch.trials.mask
    deviation = jnp.sqrt((jnp.square(offset) * share).sum() / share.sum())
    return batch._replace(advantages=offset / (deviation + 1e-8))


def _returns(batch: TrialExperience, parts: Array) -> dict[str, Array]:
    by_episode = parts @ batch.trials.returns().mean(axis=1)
    return {
        "return_before": by_episode[0], "return": by_episode[-1], "trial_return": by_episode.sum()
    }  # fmt: skip
