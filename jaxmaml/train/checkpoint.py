"""Saving a `MetaState` with orbax, and reading it back."""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxmaml.types import MetaState


def save(path: pathlib.Path, meta_state: MetaState) -> None:
    """Write the parameters, optimiser state, step and state to the new directory `path`.

    It returns when all is on disk; orbax renames the directory last, so an interruption leaves
    none of that name.

    Raises:
        ValueError: `path` exists already.
    """
    if path.exists():
        raise ValueError(f"checkpoint {path} exists already: name a new directory")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), _leaves(meta_state))
        checkpointer.wait_until_finished()


def restore(path: pathlib.Path, like: MetaState) -> MetaState:
    """Read a checkpoint into the structure, shapes and dtypes of `like` (its values are not used).

    Raises:
        ValueError: there is no checkpoint at `path`, or it is that of another model.
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
    # By path and not as a tree: orbax gives NamedTuples and empty states back as dicts and None.
    paths = jax.tree_util.tree_flatten_with_path(meta_state)[0]
    return {
        f"{index:05d} {jax.tree_util.keystr(path, simple=True, separator='.')}": leaf
        for index, (path, leaf) in enumerate(paths)
    }


def _check_same(path: pathlib.Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    def shapes(leaves: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        return {name: tuple(leaf.shape) for name, leaf in leaves.items()}

    if shapes(found) != shapes(expected):
        differing = sorted(set(shapes(found).items()) ^ set(shapes(expected).items()))
        raise ValueError(
            f"checkpoint {path} is of another model: {differing[0][0]} differs; "
            "evaluate it with the configuration it was trained with"
        )
