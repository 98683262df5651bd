"""A model as files that run without this package: a function, its parameters, a description."""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np

from jaxmaml.data.decoders import INK_BELOW, Format
from jaxmaml.experiments import provenance
from jaxmaml.files import atomic_directory, check_absent
from jaxmaml.trees import leaf_paths
from jaxmaml.types import Array

PLATFORMS = ("cpu", "cuda", "tpu")
"""The platforms that the function runs on."""
FUNCTION, PARAMETERS, DESCRIPTION = "function.jax", "parameters.npz", "model.json"


class Model(NamedTuple):
    """A model to write.

    Attributes:
        function: `(inputs [n, ...]) -> predictions [n, ...]`, for any n. It closes over its parameters.
        input_shape: the shape of one input.
        dtype: the dtype of the inputs.
        trees: the pytrees of arrays that the function closes over, by name.
        about: what else the description says.
    """

    function: Callable[[Array], Array]
    input_shape: tuple[int, ...]
    dtype: Any
    trees: Mapping[str, Any]
    about: Mapping[str, Any]


def write(model: Model, path: pathlib.Path) -> None:
    """Writes a model to a new directory: `FUNCTION`, `PARAMETERS` and `DESCRIPTION`.

    Raises:
        ValueError: `path` exists, or cannot be written.
    """
    check_absent(path)
    exported = export(model)
    arrays: dict[str, Any] = named_arrays(model.trees)
    with atomic_directory(path) as directory:
        (directory / FUNCTION).write_bytes(exported.serialize())
        np.savez(directory / PARAMETERS, **arrays)
        text = json.dumps(description(model, exported), indent=2, allow_nan=False)
        (directory / DESCRIPTION).write_text(text + "\n", "utf-8")


def export(model: Model) -> jax.export.Exported:
    """Returns the function for any number of inputs, on `PLATFORMS`."""
    sizes = ", ".join(["n", *map(str, model.input_shape)])
    inputs = jax.ShapeDtypeStruct(jax.export.symbolic_shape(sizes), model.dtype)
    return jax.export.export(jax.jit(model.function), platforms=PLATFORMS)(inputs)


def named_arrays(trees: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the arrays of pytrees by their names and paths.

    >>> list(named_arrays({"params": {"head": {"kernel": np.zeros(2)}}, "state": ()}))
    ['params/head/kernel']
    """
    return {
        f"{name}/{path}": np.asarray(leaf)
        for name, tree in trees.items()
        for path, leaf in zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True)
    }


def description(model: Model, exported: jax.export.Exported) -> dict[str, Any]:
    """Returns the contents of the description."""
    return {
        "input": {"shape": ["n", *model.input_shape], "dtype": np.dtype(model.dtype).name},
        **model.about,
        # With fewer classes than outputs, the first outputs are the classes.
        "parameters": f"{PARAMETERS}; of the outputs of the head, the first are used",
        "platforms": list(exported.platforms),
        "calling_convention_version": exported.calling_convention_version,
        "versions": provenance.versions(),
    }


def preprocessing(format: Format, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """Returns how a picture becomes an input, and what the function itself does to it."""
    return {
        "before": {
            "orientation": "as its EXIF says",
            "transparency": "on white",
            "mode": format.mode,
            "size": [format.size, format.size],
            "resample": format.resample,
            "ink": f"255 where the pixel is below {INK_BELOW}, 0 elsewhere" if format.ink else None,
        },
        "in the function": {"scale": 1 / 255, "mean": list(mean), "std": list(std)},
    }
