"""An adapted model as files that run without this package: a function, its parameters, JSON."""

import json
import pathlib
from typing import TYPE_CHECKING, Any

import jax
import jax.export
import numpy as np

from jaxmaml.experiments import provenance
from jaxmaml.files import atomic_directory, check_absent
from jaxmaml.trees import leaf_paths

if TYPE_CHECKING:
    from jaxmaml.experiments.trained import Adapted

PLATFORMS = ("cpu", "cuda", "tpu")
"""The platforms that the function runs on."""
FUNCTION, PARAMETERS, DESCRIPTION = "function.jax", "parameters.npz", "model.json"


def write(adapted: "Adapted", path: pathlib.Path) -> None:
    """Writes an adapted model to a new directory, see `Adapted.export`.

    Raises:
        ValueError: `path` exists, or cannot be written.
    """
    check_absent(path)
    exported = export(adapted)
    arrays: dict[str, Any] = named_arrays(adapted)
    with atomic_directory(path) as directory:
        (directory / FUNCTION).write_bytes(exported.serialize())
        np.savez(directory / PARAMETERS, **arrays)
        text = json.dumps(description(adapted, exported), indent=2, allow_nan=False)
        (directory / DESCRIPTION).write_text(text + "\n", "utf-8")


def export(adapted: "Adapted") -> jax.export.Exported:
    """Returns the function `inputs [n, ...] -> predictions [n, ...]`, for any n, on `PLATFORMS`.

    The parameters and the scaling of the pixels are part of it.
    """
    params, state = jax.device_get((adapted.params, adapted.state))
    trained = adapted.trained
    sizes = ", ".join(["n", *map(str, trained.input_shape)])
    dtype = np.float32 if trained.preset.is_regression else np.uint8
    inputs = jax.ShapeDtypeStruct(jax.export.symbolic_shape(sizes), dtype)
    function = jax.jit(lambda inputs: adapted.predict_fn(params, state, inputs))
    with jax.default_matmul_precision(trained.matmul_precision):
        return jax.export.export(function, platforms=PLATFORMS)(inputs)


def named_arrays(adapted: "Adapted") -> dict[str, np.ndarray]:
    """Returns the adapted parameters and the statistics by their paths, such as "params/head/kernel"."""
    trees = {"params": adapted.params, "state": adapted.state}
    return {
        f"{name}/{path}": np.asarray(leaf)
        for name, tree in trees.items()
        for path, leaf in zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True)
    }


def description(adapted: "Adapted", exported: jax.export.Exported) -> dict[str, Any]:
    """Returns the contents of model.json: what the function takes and returns."""
    trained = adapted.trained
    is_regression = trained.preset.is_regression
    return {
        "classes": list(adapted.classes),
        "input": {
            "shape": ["n", *trained.input_shape],
            "dtype": "float32" if is_regression else "uint8",
        },
        "output": "values [n, 1]" if is_regression else "probabilities [n, number of classes]",
        "preprocessing": None if is_regression else _preprocessing(adapted),
        "statistics": adapted.policy,
        "depends_on_batch": adapted.depends_on_batch,
        "learner": trained.spec.learner,
        "preset": trained.preset.name,
        "num_inner_steps": adapted.num_inner_steps,
        "platforms": list(exported.platforms),
        "calling_convention_version": exported.calling_convention_version,
        "versions": provenance.versions(),
    }


def _preprocessing(adapted: "Adapted") -> dict[str, Any]:
    """Returns how a picture becomes an input, and what the function itself does to it."""
    from jaxmaml.data import datasets

    format = adapted.trained.format
    mean, std = datasets.scaling(adapted.trained.preset.dataset)
    return {
        "before": {
            "orientation": "as its EXIF says",
            "transparency": "on white",
            "mode": format.mode,
            "size": [format.size, format.size],
            "resample": format.resample,
            "ink": "255 where the pixel is 0, and 0 elsewhere" if format.ink else None,
        },
        "in the function": {"scale": 1 / 255, "mean": list(mean), "std": list(std)},
    }
