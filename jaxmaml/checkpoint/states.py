"""Saving a pytree of arrays with orbax, and restoring it.

A checkpoint is a directory with the files of orbax and `manifest.json`, which holds the SHA-256 of
each of them: orbax itself reads most damaged files without an error. The manifest is written before
the directory gets its name, and verified before anything is read.
"""

import contextlib
import dataclasses
import glob
import hashlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxmaml.files import ReadError, WriteError, json_digest
from jaxmaml.trees import describe, leaf_path, leaf_paths

StateT = TypeVar("StateT")

_MANIFEST = "manifest.json"
_SPACE_FOR_METADATA = 200_000
_NUMPY = (np.ndarray, np.generic)
"""Bytes that orbax writes beside the arrays, with a margin."""
_TIMES = ("_CHECKPOINT_METADATA", "commit_success.txt")
"""Files that orbax writes after the manifest, and that are not read here."""


def save(
    path: str | os.PathLike[str], state: Any, *, config: Any = None, record: Any = None
) -> None:
    """Writes a state, such as a `MetaState`, to the new directory `path`.

    It returns when everything is on disk. orbax renames the directory last, so that an interruption
    leaves no directory of that name.

    Args:
        path: a directory that does not exist.
        state: a pytree of arrays.
        config: what `state` was trained with, any value that JSON can hold. The checkpoint keeps its
            digest, which `restore` compares.
        record: any value that JSON can hold, NaN and infinity included; `read_record` returns it.

    Raises:
        ValueError: `path` exists already, or the state holds NumPy numbers that are too large for
            the 32 bits of JAX without jax_enable_x64.
        WriteError: `path` cannot be written, for example because the disk is full. It is a
            ValueError; nothing is left behind.

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
    path = pathlib.Path(path).absolute()
    if path.exists():
        raise ValueError(f"checkpoint {path} exists already: name a new directory")
    check_kept(state)
    leaves = _leaves(state)
    about = {
        "config": json_digest(config), "leaves": _described(leaves), "record": json.dumps(record)
    }  # fmt: skip
    _check_space(path, leaves)
    try:
        with _quiet(), ocp.Checkpointer(_Handler()) as checkpointer:
            checkpointer.save(path, args=_Save(_nonempty(leaves), custom_metadata=about))
    except Exception as error:  # a full disk gives errors of several types
        reason = " ".join(f"{error}".split())[:300] or repr(error)
        raise WriteError(f"checkpoint {path} cannot be written: {reason}") from error
    finally:
        remove_partial(path.parent, path.name)


def restore(path: str | os.PathLike[str], like: StateT, *, config: Any = None) -> StateT:
    """Reads a checkpoint.

    Args:
        path: the directory that `save` wrote.
        like: a state of the same structure, shapes and dtypes; its values are not used. Each leaf is
            restored with the sharding of its leaf, or else to the default device: the devices that
            saved the checkpoint need not exist.
        config: the value that `save` was given; None does not compare it.

    Returns:
        The saved state.

    Raises:
        ReadError: a file of the checkpoint is damaged. It is a ValueError.
        ValueError: there is no checkpoint at `path`, or it belongs to another model or another
            configuration.

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
    path = pathlib.Path(path).absolute()
    verify(path, config=config)
    expected = _leaves(like)
    _check_same(path, _about(path)["leaves"], _described(expected))
    targets = {name: _target(leaf) for name, leaf in expected.items()}
    directory: Any = path  # orbax declares its own type of paths, and takes any
    found = _Handler().restore(directory, args=_Restore(_nonempty(targets)))
    leaves = [
        found[name] if name in found else jnp.zeros(target.shape, target.dtype)
        for name, target in targets.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def verify(path: str | os.PathLike[str], *, config: Any = None) -> None:
    """Raises ValueError unless a checkpoint is whole and as it was written.

    Args:
        path: the directory that `save` wrote.
        config: the value that `save` was given; None does not compare it.

    Raises:
        ReadError: a file of the checkpoint is damaged; the message names it. It is a ValueError.
        ValueError: there is no checkpoint at `path`, or it belongs to another configuration.

    Example:
        >>> import pathlib, tempfile, jax.numpy as jnp
        >>> from jaxmaml import MetaState, checkpoint
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = pathlib.Path(directory, "state")
        ...     checkpoint.save(path, MetaState(jnp.ones(2), (), jnp.array(0)), config={"rate": 0.1})
        ...     checkpoint.verify(path, config={"rate": 0.1})
    """
    path = pathlib.Path(path).absolute()
    if not path.is_dir():
        raise ValueError(f"there is no checkpoint at {path}")
    _check_files(path)
    if config is not None and _about(path)["config"] != json_digest(config):
        raise ValueError(
            f"checkpoint {path} was trained with another configuration than the given one"
        )


def read_record(path: str | os.PathLike[str]) -> Any:
    """Returns the record that `save` was given.

    Args:
        path: the directory that `save` wrote; see `verify`.

    Example:
        >>> import pathlib, tempfile, jax.numpy as jnp
        >>> from jaxmaml import checkpoint
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = pathlib.Path(directory, "state")
        ...     checkpoint.save(path, jnp.ones(2), record={"best": 0.5})
        ...     checkpoint.read_record(path)
        {'best': 0.5}
    """
    return json.loads(_about(pathlib.Path(path).absolute())["record"])


def remove_partial(directory: pathlib.Path, name: str | None = None) -> None:
    """Removes what an interrupted `save` left in a directory.

    Args:
        directory: the parent of the checkpoints.
        name: the name of the checkpoint; None for all of them.
    """
    start = "*" if name is None else glob.escape(name)
    for partial in directory.glob(f"{start}.orbax-checkpoint-tmp*"):
        shutil.rmtree(partial, ignore_errors=True)


class _Handler(ocp.StandardCheckpointHandler):
    """The handler of orbax, with the manifest."""

    def finalize(self, directory: Any) -> None:
        """Writes the manifest. orbax calls it when all other files of the item are on disk."""
        super().finalize(directory)
        path = pathlib.Path(directory)
        text = json.dumps({name: _sha256(path / name) for name in _file_names(path)}, indent=1)
        (path / _MANIFEST).write_text(text)


@ocp.args.register_with_handler(_Handler, for_save=True)
@dataclasses.dataclass
class _Save(ocp.args.StandardSave):
    """The arguments by which orbax finds `_Handler`."""


@ocp.args.register_with_handler(_Handler, for_restore=True)
@dataclasses.dataclass
class _Restore(ocp.args.StandardRestore):
    """The arguments by which orbax finds `_Handler`."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what orbax logs: it logs a traceback for each error that it raises."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _check_space(path: pathlib.Path, leaves: dict[str, Any]) -> None:
    """Raises WriteError if the disk has no room for a checkpoint."""
    # orbax finds this out in its threads, and prints a traceback for each of them.
    size = sum(jnp.size(leaf) * jnp.result_type(leaf).itemsize for leaf in leaves.values())
    needed = 1.1 * size + _SPACE_FOR_METADATA
    existing = next(parent for parent in path.parents if parent.exists())
    usage = shutil.disk_usage(existing)
    if usage.total and usage.free < needed:
        raise WriteError(
            f"checkpoint {path} cannot be written: it needs {needed / 1e6:.1f} MB, and the disk has "
            f"{usage.free / 1e6:.1f} MB left"
        )


def _file_names(path: pathlib.Path) -> list[str]:
    """Returns the files of a checkpoint that the manifest covers."""
    files = (file for file in path.rglob("*") if file.is_file())
    names = sorted(file.relative_to(path).as_posix() for file in files)
    return [name for name in names if name not in (_MANIFEST, *_TIMES)]


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_files(path: pathlib.Path) -> None:
    """Raises ReadError, with the name of the file, if the manifest and the files do not agree."""
    manifest = path / _MANIFEST
    try:
        expected = json.loads(manifest.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ReadError(
            f"{manifest} cannot be read ({error}): the checkpoint is damaged, or of another version"
        ) from None
    if not isinstance(expected, dict) or not expected:
        raise ReadError(f"{manifest} lists no files: the checkpoint is damaged")
    for name, digest in expected.items():
        try:
            found = _sha256(path / name)
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise ReadError(f"{path / name} of a checkpoint cannot be read: {error}") from None
        if found != digest:
            raise ReadError(f"{path / name} is damaged: its SHA-256 is not the one in {_MANIFEST}")


def _about(path: pathlib.Path) -> dict[str, Any]:
    """Returns what `save` stored beside the arrays: "config", "leaves" and "record"."""
    directory: Any = path
    about = _Handler().metadata(directory).custom_metadata
    if not isinstance(about, dict) or set(about) != {"config", "leaves", "record"}:
        raise ValueError(f"checkpoint {path} was not written by jaxmaml.checkpoint.save")
    return about


def _leaves(state: Any) -> dict[str, Any]:
    # By path and not as a tree: orbax returns NamedTuples and empty states as dicts and None.
    pairs = zip(leaf_paths(state), jax.tree.leaves(state), strict=True)
    return {
        f"{index:05d} {path.replace('/', '.')}": leaf for index, (path, leaf) in enumerate(pairs)
    }


def _nonempty(leaves: dict[str, Any]) -> dict[str, Any]:
    """Returns the leaves with at least one number: orbax refuses the others, which say nothing."""
    return {name: leaf for name, leaf in leaves.items() if 0 not in jnp.shape(leaf)}


def check_kept(state: Any) -> None:
    """Raises ValueError if a NumPy number of 64 bits is too large for the 32 bits that JAX keeps.

    It would come back as another one. That a float64 loses digits is JAX's rule everywhere.

    Example:
        >>> import numpy as np
        >>> check_kept({"count": np.int64(3)})
    """
    for path, leaf in jax.tree.leaves_with_path(state):
        kept = jax.dtypes.canonicalize_dtype(leaf.dtype) if isinstance(leaf, _NUMPY) else None
        if kept is not None and kept != leaf.dtype and _is_too_large(leaf, kept):
            raise ValueError(
                f"the state holds numbers at {leaf_path(path)!r} that are too large for {kept}: make "
                f"them smaller, or set jax_enable_x64 for {leaf.dtype}"
            )


def _is_too_large(leaf: Any, kept: np.dtype) -> bool:
    if np.issubdtype(leaf.dtype, np.integer):
        bounds = np.iinfo(kept)
        return bool(((leaf < bounds.min) | (leaf > bounds.max)).any())
    return bool((np.isfinite(leaf) & (np.abs(leaf) > np.finfo(kept).max)).any())


def _described(leaves: dict[str, Any]) -> dict[str, str]:
    """Returns the dtype and shape of each leaf, as in "float32[2,3]"."""
    return {name: describe(leaf) for name, leaf in leaves.items()}


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape, dtype and sharding with which a leaf is restored."""
    shape = jax.eval_shape(lambda leaf: leaf, leaf)
    default = jax.sharding.SingleDeviceSharding(jnp.zeros(()).device)
    sharding = getattr(leaf, "sharding", None) or default
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _check_same(path: pathlib.Path, found: dict[str, str], expected: dict[str, str]) -> None:
    differing = sorted(name for name, _ in set(found.items()) ^ set(expected.items()))
    if differing:
        name = differing[0]
        raise ValueError(
            f"checkpoint {path} belongs to another model: {name.partition(' ')[2]} is "
            f"{found.get(name, 'absent')} in the checkpoint and {expected.get(name, 'absent')} in "
            "the model; restore it with the configuration that it was trained with"
        )
