"""Recurrent policies, which remember what happened in a task."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmaml import nn
from jaxmaml.checks import check_count
from jaxmaml.rl.environments import Environment
from jaxmaml.rl.policies import CategoricalPolicy, GaussianPolicy
from jaxmaml.types import Array, Params

Hidden: TypeAlias = Any
"""The hidden state of a network: a pytree of floating-point arrays."""


class Memory(NamedTuple):
    """The memory of a recurrent policy, from step to step and from one episode of a task to the next.

    Attributes:
        hidden: the hidden state of the network, leaves `[num_trajectories, ...]`.
        action: the last action, one-hot if actions are discrete, `[num_trajectories, action_size]`.
        reward: the last reward, `[num_trajectories]`.
        done: 1 if an episode has just ended, else 0, `[num_trajectories]`.

    Example:
        >>> import jax.numpy as jnp
        >>> memory = Memory(jnp.zeros((2, 8)), jnp.zeros((2, 3)), jnp.zeros(2), jnp.zeros(2))
        >>> memory.inputs(jnp.ones((2, 4))).shape
        (2, 9)
    """

    hidden: Hidden
    action: Array
    reward: Array
    done: Array

    def inputs(self, observations: Array) -> Array:
        """Returns the observation, the last action, reward and end, `[num_trajectories, input_size]`."""
        numbers = self.reward[:, None], self.done[:, None]
        return jnp.concatenate([observations, self.action, *numbers], axis=1)


class WithMemory(NamedTuple):
    """The adapted parameters of a learner that remembers: the parameters stay, the memory changes.

    Attributes:
        params: the parameters of the policy.
        memory: what the policy remembers of the task.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from jaxmaml import rl
        >>> environment = rl.bandit(5)
        >>> policy, params = rl.recurrent_policy(environment, hidden_size=8, rngs=nnx.Rngs(0))
        >>> learner = rl.rl_squared(rl.RecurrentProblem(environment, policy, horizon=10))
        >>> request = rl.Request(jax.random.key(0), environment.sample_task(jax.random.key(1)))
        >>> adapted, _ = learner.adapt(params, request, num_inner_steps=1)
        >>> rl.WithMemory(*adapted).memory.done.tolist()
        [1.0]
    """

    params: Params
    memory: Memory


class RecurrentPolicy(NamedTuple):
    """A recurrent policy with a prediction of the return, as two pure functions.

    Attributes:
        start: `params -> hidden`, before the first step in a task, without a leading axis.
        step: `(params, hidden, inputs) -> (hidden, distribution, values)`, with a leading axis
            `[num_trajectories]` each: `inputs` are those of `Memory`, `values [num_trajectories]`
            predict the discounted sum of the rewards to come.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxmaml import rl
        >>> policy, params = rl.recurrent_policy(rl.bandit(5), hidden_size=8, rngs=nnx.Rngs(0))
        >>> hidden = jnp.zeros((3, *policy.start(params).shape))
        >>> hidden, distribution, values = policy.step(params, hidden, jnp.ones((3, 8)))
        >>> hidden.shape, distribution.logits.shape, values.shape
        ((3, 8), (3, 5), (3,))
    """

    start: Callable[[Params], Hidden]
    step: Callable[[Params, Hidden, Array], tuple[Hidden, Any, Array]]


class GruPolicy(nnx.Module):
    """A gated recurrent unit, and linear functions of its state for the actions and the value.

    Paths of the parameters: `cell/dense_i`, `cell/dense_h`, those of `GaussianPolicy` or
    `CategoricalPolicy` without hidden layers under `actions/`, and `value`.

    Args:
        environment: its sizes, and whether its actions are discrete, decide about the network.
        hidden_size: the size of the hidden state.
        rngs: the source of the initial parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxmaml import rl
        >>> policy = GruPolicy(rl.navigation_2d(), hidden_size=8, rngs=nnx.Rngs(0))
        >>> hidden, distribution, values = policy(jnp.zeros((3, 8)), jnp.ones((3, 6)))
        >>> hidden.shape, distribution.mean.shape, values.shape
        ((3, 8), (3, 2), (3,))
    """

    def __init__(self, environment: Environment, *, hidden_size: int, rngs: nnx.Rngs):
        num_inputs = environment.observation_size + environment.action_size + 2
        make = CategoricalPolicy if environment.is_discrete else GaussianPolicy
        self.cell = nnx.GRUCell(num_inputs, hidden_size, rngs=rngs)
        self.actions = make(hidden_size, environment.action_size, hidden_sizes=(), rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        self.value = nnx.Linear(hidden_size, 1, kernel_init=zeros, rngs=rngs)

    def __call__(self, hidden: Array, inputs: Array) -> tuple[Array, Any, Array]:
        """Returns the next hidden state, the distribution of actions and the values."""
        hidden, features = self.cell(hidden, inputs)
        return hidden, self.actions(features), self.value(features)[:, 0]


def recurrent_policy(
    environment: Environment, *, hidden_size: int = 64, rngs: nnx.Rngs
) -> tuple[RecurrentPolicy, Params]:
    """Returns a recurrent policy for an environment, as pure functions and its initial parameters.

    Duan et al. 2016, RL² (arXiv 1611.02779), section 2.3: the network is a GRU. It sees the observation,
    the last action and reward, and whether an episode has just ended; its hidden state starts from zero.

    Args:
        environment: its sizes, and whether its actions are discrete, decide about the network.
        hidden_size: the size of the hidden state; the paper's is 256.
        rngs: the source of the initial parameters.

    Raises:
        TypeError: `hidden_size` is not an integer.
        ValueError: `hidden_size` is less than 1.

    Example:
        >>> from flax import nnx
        >>> from jaxmaml import rl
        >>> policy, params = rl.recurrent_policy(rl.bandit(5), hidden_size=8, rngs=nnx.Rngs(0))
        >>> policy.start(params).shape
        (8,)
    """
    check_count("hidden_size", hidden_size)
    module = GruPolicy(environment, hidden_size=hidden_size, rngs=rngs)
    run, params = nn.from_nnx(module, lambda module, batch: module(*batch))

    def start(params: Params) -> Array:
        return jnp.zeros(hidden_size, jnp.result_type(*jax.tree.leaves(params)))

    return RecurrentPolicy(start, lambda params, *batch: run(params, batch)), params
