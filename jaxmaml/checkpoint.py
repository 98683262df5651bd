"""Saving a `MetaState` with orbax, and restoring it."""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxmaml.trees import leaf_paths
from jaxmaml.types import MetaState


def save(path: pathlib.Path, meta_state: MetaState) -> None:
    """Writes the parameters, optimizer state, step and state to the new directory `path`.

    It returns when everything is on disk. orbax renames the directory last, so that an interruption
    leaves no directory of that name.

    Args:
        path: a directory that does not exist.
        meta_state: what to save.

    Raises:
        ValueError: `path` exists already.

    Example:
        >>> import pathlib, tempfile, jax.numpy as jnp, optax, jaxmaml
        >>> from jaxmaml import checkpoint
        >>> learner = jaxmaml.maml(lambda params, batch: jnp.mean(params**2), optax.sgd(0.1), 1)
        >>> meta_state = jaxmaml.init_state(learner, optax.adam(1e-3), jnp.ones(2))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = pathlib.Path(directory, "state")
        ...     checkpoint.save(path, meta_state)
        ...     checkpoint.restore(path, like=meta_state).params.tolist()
        [1.0, 1.0]
    """
    if path.exists():
        raise ValueError(f"checkpoint {path} exists already: name a new directory")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), _leaves(meta_state))
        checkpointer.wait_until_finished()


def restore(path: pathlib.Path, like: MetaState) -> MetaState:
    """Reads a checkpoint.

    Args:
        path: the directory that `save` wrote.
        like: a state of the same structure, shapes and dtypes; its values are not used.

    Returns:
        The saved state.

    Raises:
        ValueError: there is no checkpoint at `path`, or it belongs to another model.

    Example:
        >>> import pathlib, tempfile, jax.numpy as jnp, optax, jaxmaml
        >>> from jaxmaml import checkpoint
        >>> learner = jaxmaml.maml(lambda params, batch: jnp.mean(params**2), optax.sgd(0.1), 1)
        >>> meta_state = jaxmaml.init_state(learner, optax.adam(1e-3), jnp.ones(2))
        >>> like = jaxmaml.init_state(learner, optax.adam(1e-3), jnp.zeros(2))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = pathlib.Path(directory, "state")
        ...     checkpoint.save(path, meta_state)
        ...     checkpoint.restore(path, like).params.tolist()
        [1.0, 1.0]
    """
    if not path.is_dir():
        raise ValueError(f"no checkpoint at {path}: the run was interrupted before its end")
    expected = jax.eval_shape(lambda tree: tree, _leaves(like))
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.metadata(path.absolute()).item_metadata.tree
        _check_same(path, found, expected)
        leaves = checkpointer.restore(path.absolute(), expected)
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in sorted(leaves)])


def _leaves(meta_state: MetaState) -> dict[str, Any]:
    # By path and not as a tree: orbax returns NamedTuples and empty states as dicts and None.
    pairs = zip(leaf_paths(meta_state), jax.tree.leaves(meta_state), strict=True)
    return {
        f"{index:05d} {path.replace('/', '.')}": leaf for index, (path, leaf) in enumerate(pairs)
    }


def _check_same(path: pathlib.Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    def shapes(leaves: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        return {name: tuple(leaf.shape) for name, leaf in leaves.items()}

    if shapes(found) != shapes(expected):
        differing = sorted(set(shapes(found).items()) ^ set(shapes(expected).items()))
        raise ValueError(
            f"checkpoint {path} belongs to another model: {differing[0][0]} differs; "
            "evaluate it with the configuration that it was trained with"
        )
