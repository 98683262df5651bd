"""Parts that the adapters of other packages' environments share."""

import contextlib
import importlib
import sys
import warnings
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmaml import trees
from jaxmaml.rl.environments import Environment, EnvState, EnvTask, Step
from jaxmaml.types import Array


def import_extra(module: str, extra: str) -> ModuleType:
    """Imports a module that only an extra of jaxmaml installs.

    Args:
        module: its dotted name.
        extra: the extra, for the message.

    Raises:
        ImportError: the module, or one that it imports, is not installed.

    Example:
        >>> import_extra("no_such_module", "brax")
        Traceback (most recent call last):
        ImportError: no_such_module is not installed: pip install 'jaxmaml[brax]'
    """
    try:
        # What packages say about one another is not for the caller: MuJoCo prints what it does not
        # find, and standard output belongs to the program.
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        message = f"{error.name} is not installed: pip install 'jaxmaml[{extra}]'"
        raise ImportError(message, name=error.name) from error


class Held(NamedTuple):
    """The state of an environment that `held` returns.

    Attributes:
        state: that of the environment within.
        observation: what it shows, `[observation_size]`.
        done: whether the episode has ended, bool `[]`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxmaml import rl
        >>> state, _ = held(rl.navigation_2d()).reset(jax.random.key(0), jnp.ones(2))
        >>> state.state.tolist(), bool(state.done)
        ([0.0, 0.0], False)
    """

    state: EnvState
    observation: Array
    done: Array


def held(environment: Environment) -> Environment:
    """Returns an environment that stays where its episode ended, with rewards of zero.

    Simulators have no sense after the end of an episode: their numbers may grow until they are NaN,
    which no mask removes from a mean.

    Args:
        environment: one whose states after the end may be anything.

    Returns:
        An environment with states of type `Held`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxmaml import rl
        >>> environment = held(rl.navigation_2d())
        >>> goal = jnp.array([0.1, 0.0])
        >>> state, _ = environment.reset(jax.random.key(0), goal)
        >>> walk = lambda state: environment.step(jax.random.key(0), state, jnp.ones(2), goal)
        >>> step = environment.step(jax.random.key(0), state, jnp.array([1.0, 0.0]), goal)
        >>> walk(step.state).observation.tolist() == goal.tolist(), float(walk(step.state).reward)
        (True, 0.0)
    """

    def reset(key: Array, task: EnvTask) -> tuple[Held, Array]:
        state, observation = environment.reset(key, task)
        return Held(as_arrays(state), observation, jnp.array(False)), observation

    def step(key: Array, before: Held, action: Array, task: EnvTask) -> Step:
        found = environment.step(key, before.state, action, task)
        after = Held(found.state, found.observation, found.done)
        keep = lambda old, new: jnp.where(before.done, old, jnp.asarray(new, old.dtype))
        after = jax.tree.map(keep, before, after)
        reward = jnp.where(before.done, 0, found.reward)
        return Step(after, after.observation, reward, after.done)

    return environment._replace(reset=reset, step=step)


def as_arrays(tree: Any) -> Any:
    """Returns a pytree whose Python numbers are arrays, of the types that they have in a scan.

    Example:
        >>> as_arrays({"length": 0.5})
        {'length': Array(0.5, dtype=float32)}
    """
    # With a dtype that is given, JAX does not mark the type of the array as weak.
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.asarray(leaf).dtype), tree)


def flat(observation: Any) -> Array:
    """Returns an observation, a pytree of arrays, as one floating-point vector.

    Example:
        >>> import jax.numpy as jnp
        >>> flat({"image": jnp.ones((2, 2), bool), "speed": jnp.array(0.5)}).tolist()
        [1.0, 1.0, 1.0, 1.0, 0.5]
    """
    return jnp.concatenate(
        [leaf.ravel() for leaf in jax.tree.leaves(trees.in_float32(observation))]
    )
