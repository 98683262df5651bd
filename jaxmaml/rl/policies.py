"""Policies: networks whose output is a distribution of actions."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmaml import nn
from jaxmaml.rl.environments import Environment
from jaxmaml.types import Array, Params

HIDDEN_SIZES = (100, 100)
"""The hidden layers of the MAML paper's policies."""
MIN_LOG_STD = -13.8
"""The least log standard deviation, that of 1e-6: a smaller one would make the likelihood overflow."""


class Distribution(Protocol):
    """A distribution of actions, with any leading axes."""

    def sample(self, key: Array) -> Array:
        """Returns an action for each leading index."""
        ...

    def log_prob(self, actions: Array) -> Array:
        """Returns the log-likelihood of actions, one number for each leading index."""
        ...

    def kl(self, other: Any) -> Array:
        """Returns the Kullback-Leibler divergence from this distribution to another one."""
        ...

    def entropy(self) -> Array:
        """Returns the entropy."""
        ...


def log_likelihood(distribution: Any, actions: Array, like: Array) -> Array:
    """Returns the log-likelihood of actions, one number for each number of `like`.

    Raises:
        ValueError: `log_prob` returns another shape, such as one with the axis of the actions.

    Example:
        >>> import jax.numpy as jnp
        >>> unit = Normal(jnp.zeros((5, 2)), jnp.zeros(2))
        >>> log_likelihood(unit, jnp.zeros((5, 2)), jnp.zeros(5)).shape
        (5,)
    """
    found = distribution.log_prob(actions)
    if jnp.shape(found) != jnp.shape(like):
        raise ValueError(
            f"log_prob of {type(distribution).__name__} must return one number per action, "
            f"{list(jnp.shape(like))}; got {list(jnp.shape(found))}"
        )
    return found


PolicyFn: TypeAlias = Callable[[Params, Array], Any]
"""`(params, observations [..., observation_size]) -> Distribution`."""


class Normal(NamedTuple):
    """A Gaussian with independent coordinates.

    Attributes:
        mean: `[..., action_size]`.
        log_std: the logarithm of the standard deviations, of a shape that broadcasts to `mean`.

    Example:
        >>> import jax.numpy as jnp
        >>> unit = Normal(jnp.zeros(2), jnp.zeros(2))
        >>> round(float(unit.log_prob(jnp.zeros(2))), 3), float(unit.kl(unit))
        (-1.838, 0.0)
    """

    mean: Array
    log_std: Array

    def sample(self, key: Array) -> Array:
        """Returns an action for each leading index, `[..., action_size]`."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(self.log_std) * noise

    def log_prob(self, actions: Array) -> Array:
        """Returns the log-likelihood of actions, `[...]`."""
        return jax.scipy.stats.norm.logpdf(actions, self.mean, jnp.exp(self.log_std)).sum(-1)

    def kl(self, other: "Normal") -> Array:
        """Returns the divergence KL(self || other), `[...]`."""
        variance, other_variance = jnp.exp(2 * self.log_std), jnp.exp(2 * other.log_std)
        distance = variance + jnp.square(self.mean - other.mean)
        terms = other.log_std - self.log_std + distance / (2 * other_variance) - 0.5
        return terms.sum(-1)

    def entropy(self) -> Array:
        """Returns the entropy, `[...]`."""
        log_std = jnp.broadcast_to(self.log_std, self.mean.shape)
        return (log_std + 0.5 * jnp.log(2 * jnp.pi * jnp.e)).sum(-1)


class Categorical(NamedTuple):
    """A distribution of integers.

    Attributes:
        logits: unnormalized log-probabilities, `[..., num_actions]`.

    Example:
        >>> import jax.numpy as jnp
        >>> fair = Categorical(jnp.zeros(4))
        >>> round(float(jnp.exp(fair.log_prob(jnp.array(2)))), 3), float(fair.kl(fair))
        (0.25, 0.0)
    """

    logits: Array

    def sample(self, key: Array) -> Array:
        """Returns an action for each leading index, int32 `[...]`."""
        return jax.random.categorical(key, self.logits).astype(jnp.int32)

    def log_prob(self, actions: Array) -> Array:
        """Returns the log-likelihood of actions, `[...]`."""
        log_probs = jax.nn.log_softmax(self.logits)
        return jnp.take_along_axis(log_probs, actions[..., None], axis=-1)[..., 0]

    def kl(self, other: "Categorical") -> Array:
        """Returns the divergence KL(self || other), `[...]`."""
        log_probs = jax.nn.log_softmax(self.logits)
        other_log_probs = jax.nn.log_softmax(other.logits)
        return _expected(log_probs, log_probs - other_log_probs)

    def entropy(self) -> Array:
        """Returns the entropy, `[...]`."""
        log_probs = jax.nn.log_softmax(self.logits)
        return -_expected(log_probs, log_probs)


def _expected(log_probs: Array, values: Array) -> Array:
    """The mean of a value per action. An action that cannot be taken counts nothing."""
    can_be = log_probs > -jnp.inf
    return (jnp.exp(log_probs) * jnp.where(can_be, values, 0)).sum(-1)


class GaussianPolicy(nnx.Module):
    """A policy whose mean is a network of the observation, with a learned standard deviation.

    Paths of the parameters: those of `nn.MLP` under `mean/`, and `log_std`.

    Args:
        observation_size, action_size: those of the environment.
        hidden_sizes: the hidden layers, with ReLU.
        log_std: the initial value of the logarithm of the standard deviation.
        rngs: the source of the initial parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> policy = GaussianPolicy(2, 3, rngs=nnx.Rngs(0))
        >>> policy(jnp.ones((10, 2))).mean.shape
        (10, 3)
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        *,
        hidden_sizes: Sequence[int] = HIDDEN_SIZES,
        log_std: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.mean = _network(observation_size, action_size, hidden_sizes, rngs)
        self.log_std = nnx.Param(jnp.full(action_size, log_std))

    def __call__(self, observations: Array) -> Normal:
        """Returns the distribution of actions for observations `[..., observation_size]`."""
        mean = _on_last_axis(self.mean, observations)
        return Normal(mean, jnp.maximum(self.log_std[...], MIN_LOG_STD))


class CategoricalPolicy(nnx.Module):
    """A policy whose logits are a network of the observation.

    Paths of the parameters: those of `nn.MLP` under `logits/`.

    Args:
        observation_size, num_actions: those of the environment.
        hidden_sizes: the hidden layers, with ReLU.
        rngs: the source of the initial parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> policy = CategoricalPolicy(2, 5, rngs=nnx.Rngs(0))
        >>> policy(jnp.ones((10, 2))).logits.shape
        (10, 5)
    """

    def __init__(
        self,
        observation_size: int,
        num_actions: int,
        *,
        hidden_sizes: Sequence[int] = HIDDEN_SIZES,
        rngs: nnx.Rngs,
    ):
        self.logits = _network(observation_size, num_actions, hidden_sizes, rngs)

    def __call__(self, observations: Array) -> Categorical:
        """Returns the distribution of actions for observations `[..., observation_size]`."""
        return Categorical(_on_last_axis(self.logits, observations))


def policy(
    environment: Environment, *, hidden_sizes: Sequence[int] = HIDDEN_SIZES, rngs: nnx.Rngs
) -> tuple[PolicyFn, Params]:
    """Returns a policy for an environment, as a pure function and its initial parameters.

    Args:
        environment: its sizes, and whether its actions are discrete, decide about the network.
        hidden_sizes: the hidden layers, with ReLU.
        rngs: the source of the initial parameters.

    Returns:
        `(policy_fn, params)`, where `policy_fn(params, observations)` is a `Normal` or a
        `Categorical`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxmaml import rl
        >>> policy_fn, params = rl.policy(rl.bandit(5), hidden_sizes=(8,), rngs=nnx.Rngs(0))
        >>> policy_fn(params, jnp.ones(1)).logits.shape
        (5,)
    """
    make = CategoricalPolicy if environment.is_discrete else GaussianPolicy
    sizes = environment.observation_size, environment.action_size
    module = make(*sizes, hidden_sizes=hidden_sizes, rngs=rngs)
    return nn.from_nnx(module, lambda module, observations: module(observations))


def _network(num_inputs: int, num_outputs: int, hidden: Sequence[int], rngs: nnx.Rngs) -> nn.MLP:
    """The network of the MAML paper's code, which starts from Glorot's uniform distribution."""
    init = nnx.initializers.glorot_uniform()
    return nn.MLP(
        num_inputs, num_outputs, hidden=hidden, hidden_init=init, head_init=init, rngs=rngs
    )


def _on_last_axis(network: nn.MLP, observations: Array) -> Array:
    """The outputs of a network of one axis of examples, for any leading axes."""
    *leading, size = observations.shape
    return network(observations.reshape(-1, size)).reshape(*leading, -1)
