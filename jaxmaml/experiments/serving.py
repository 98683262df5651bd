"""Serves a trained run: reads a support set and inputs from files, adapts, predicts, writes files."""

import csv
import io
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmaml import files, stages
from jaxmaml.data import folders
from jaxmaml.experiments import gallery, plots, points, supports
from jaxmaml.experiments.presets import Preset
from jaxmaml.experiments.trained import Adapted, Statistics, Trained


class Request(NamedTuple):
    """The files of one adaptation.

    Attributes:
        support: a folder with one folder of pictures per class; for regression a CSV of x and y.
        images: a picture, or a folder of pictures, to classify; None for regression.
        points: a CSV of x to predict; None for a classifier.
        out: the CSV to write, and beside it a picture of the same name.
        export: the directory for the adapted model; None writes none.
    """

    support: pathlib.Path
    images: pathlib.Path | None
    points: pathlib.Path | None
    out: pathlib.Path
    export: pathlib.Path | None = None

    @property
    def picture(self) -> pathlib.Path:
        """The picture of the support and the predictions."""
        return self.out.with_suffix(".png")


class Served(NamedTuple):
    """The outcome of a request, not written yet.

    Attributes:
        adapted: the adapted model.
        table: the CSV, as rows; the first has the names of the columns.
        picture: the PNG file of the picture.
    """

    adapted: Adapted
    table: list[list[Any]]
    picture: bytes


def default_out(run_dir: pathlib.Path, label: str | None) -> pathlib.Path:
    """Returns the CSV that is written in the current directory, named after a run.

    >>> default_out(pathlib.Path("runs/mine"), "exact@0.1").name
    'mine-exact-0.1-predictions.csv'
    """
    name = "-".join([run_dir.resolve().name, *([label] if label else []), "predictions"])
    return pathlib.Path(re.sub(r"[^\w.-]+", "-", name).strip("-") + ".csv")


def check(request: Request, preset: Preset) -> None:
    """Raises ValueError unless the files suit the kind of run, and nothing is overwritten."""
    supports.check_takes_examples(preset)
    kind, needed, other = ("classifies", "images", "points")
    if preset.is_regression:
        kind, needed, other = ("predicts numbers", "points", "images")
    if getattr(request, needed) is None:
        raise ValueError(f"this run {kind}: it needs --{needed}")
    if getattr(request, other) is not None:
        raise ValueError(f"this run {kind}: --{other} has no effect; give --{needed} only")
    if request.out.suffix != ".csv":
        raise ValueError(f"--out {request.out} must be the name of a file with the suffix .csv")
    for path in (request.out, request.picture, request.export):
        if path is not None:
            files.check_absent(path)


def serve(
    trained: Trained,
    request: Request,
    *,
    num_inner_steps: int | None = None,
    statistics: Statistics = "support",
) -> Served:
    """Adapts to the support of a request and predicts; writes nothing.

    Raises:
        ValueError: a file cannot be read, or does not suit the run.
    """
    check(request, trained.preset)
    options: dict[str, Any] = {"num_inner_steps": num_inner_steps, "statistics": statistics}
    serve_kind = _serve_points if trained.preset.is_regression else _serve_images
    return serve_kind(trained, request, options)


def write(request: Request, served: Served) -> list[pathlib.Path]:
    """Writes the files of a request, all of them or none, and returns their paths.

    Raises:
        ValueError: a file exists, or cannot be written.
    """
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(served.table)
    # Names of files and folders may have bytes that are not UTF-8.
    table = text.getvalue().encode(errors="backslashreplace")
    contents = {request.out: table, request.picture: served.picture}
    written: list[pathlib.Path] = []
    try:
        for path, content in contents.items():
            with files.atomic_write(path, replace=False) as file:
                file.write(content)
            written.append(path)
        if request.export is not None:
            served.adapted.export(request.export)
            written.append(request.export)
    except BaseException:
        for path in written:
            path.unlink()
        raise
    return written


def _serve_images(trained: Trained, request: Request, options: Mapping[str, Any]) -> Served:
    assert request.images is not None  # `check` has refused such a request
    # The names of files first: a folder without pictures is refused before any is decoded.
    paths = folders.images_in(request.images)
    support = trained.read_support(request.support)
    images = trained.read_images(paths)
    adapted = trained.adapt(support, **options)
    probabilities = adapted.predict(images)

    # The table.
    names = adapted.classes
    table: list[list[Any]] = [["file", "predicted", *(f"p({name})" for name in names)]]
    for path, row in zip(paths, probabilities, strict=True):
        table.append([path.name, names[row.argmax()], *(f"{p:.6g}" for p in row)])

    # The picture.
    with stages.stage("drawing the picture"):
        figure = gallery.draw(
            support["inputs"], support["targets"], names, [path.name for path in paths], images,
            probabilities,
            title=f"{trained.preset.name}, {_about(adapted)}",
        )  # fmt: skip
        return Served(adapted, table, gallery.png(figure))


def _serve_points(trained: Trained, request: Request, options: Mapping[str, Any]) -> Served:
    assert request.points is not None  # `check` has refused such a request
    support = points.read(request.support, ("x", "y"))
    x = points.read(request.points, ("x",))["x"]
    adapted = trained.adapt({"inputs": support["x"], "targets": support["y"]}, **options)
    table: list[list[Any]] = [["x", "predicted"]]
    table += [[f"{a:.9g}", f"{y:.9g}"] for a, y in zip(x, adapted.predict(x)[:, 0], strict=True)]

    # The curve over the range of all points.
    every = np.concatenate([x, support["x"]])
    grid = np.linspace(every.min(), every.max(), 200, dtype=np.float32)
    before = trained.adapt(
        {"inputs": support["x"], "targets": support["y"]}, **{**options, "num_inner_steps": 0}
    )
    curves = {"before": before.predict(grid)}
    steps = adapted.num_inner_steps
    if steps:
        curves[f"after {steps} step{'s' * (steps != 1)}"] = adapted.predict(grid)
    figure = plots.regression(grid, curves, support["x"], support["y"])
    return Served(adapted, table, gallery.png(figure))


def report(adapted: Adapted, paths: Sequence[pathlib.Path], num: int) -> str:
    """Returns the line that says what was done, and by which statistics.

    Args:
        adapted: the adapted model.
        paths: the files that were written.
        num: the number of predictions.
    """
    what = "point" if adapted.trained.preset.is_regression else "picture"
    return (
        f"{num} {what}{'s' * (num != 1)}, {_about(adapted)}; written to "
        f"{', '.join(map(str, paths))}"
    )


def _about(adapted: Adapted) -> str:
    steps = adapted.num_inner_steps
    return (
        f"{adapted.trained.label} after {steps} inner step{'s' * (steps != 1)}, normalization: "
        f"{adapted.policy}"
    )
