"""Drawing functions: learning curves, scores per inner step, gradient agreement, episodes.

Every function takes plain numbers, as `results.json` and `metrics.jsonl` hold them, and returns a
matplotlib `Figure`. None stands for a number that was not finite, and is drawn as a gap. Nothing
here opens a window or touches matplotlib's global state, so these functions work in threads and
without a display. The colors are those of Okabe and Ito, which color-blind readers can tell apart.
"""

import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from jaxmaml.files import atomic_write

Numbers: TypeAlias = Sequence[float | None] | np.ndarray
Curve: TypeAlias = Mapping[str, Any]

LEARNER_COLORS = {"exact": "#0072B2", "first": "#D55E00", "maml": "#0072B2", "fomaml": "#D55E00"}
OTHER_COLORS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
VARIANTS = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ((0, (6, 1, 1, 1, 1, 1)), "v"))
FORMATS = ("png", "pdf", "svg", "eps", "ps", "jpg", "jpeg", "tif", "tiff", "webp")
REFERENCE = {"color": "0.45", "linestyle": "--", "linewidth": 1.2}
RIGHT_COLOR, WRONG_COLOR = "#009E73", "#CC2529"
CELL_INCHES, CELL_STRIDE, GAP = 0.55, 1.16, 0.7


def learning_curves(curves: Mapping[str, Curve], *, ylabel: str) -> Figure:
    """Draws one line per run against the outer step.

    Args:
        curves: label -> {"step": [...], "value": [...], "ci95": [...]}. The last one is optional and
            drawn as a band. A label is a learner's name, followed by "@" and the inner rate if a
            learner ran at several rates. The color stands for the name, the line style for the
            rate. Values are not smoothed.
        ylabel: the name of the values, with their unit if they have one.

    Raises:
        ValueError: `curves` is empty.

    >>> curve = {"step": [0, 100, 200], "value": [1.6, None, 0.7]}
    >>> figure = learning_curves({"exact": curve}, ylabel="query loss")
    >>> figure.axes[0].get_ylabel()
    'query loss'
    """
    _check_labels("curves", curves)
    figure, (axes,) = _figure("Learning curves")
    for label, style in _styles(curves).items():
        step, value = _floats(curves[label]["step"]), _floats(curves[label]["value"])
        # A value between two gaps draws no line: without a marker it would be invisible.
        marker = style["marker"] if len(step) <= 30 else ""
        axes.plot(step, value, label=label, markersize=4, **{**style, "marker": marker})
        if curves[label].get("ci95") is not None:
            ci95 = _floats(curves[label]["ci95"])
            axes.fill_between(
                step, value - ci95, value + ci95, color=style["color"], alpha=0.15, linewidth=0
            )
    _finish(axes, "outer step", ylabel, [curve["value"] for curve in curves.values()])
    _legend_below(figure)
    return figure


def metric_per_step(
    runs: Mapping[str, Curve],
    *,
    ylabel: str,
    reference: tuple[str, float] | None = None,
    headline: int | None = None,
) -> Figure:
    """Draws the metric on test tasks against the inner step, with 95 % confidence intervals.

    Args:
        runs: label -> {"mean": [n+1], "ci95": [n+1]}, after 0..n inner steps; labels as in
            `learning_curves`.
        ylabel: the name of the metric.
        reference: a score on the same tasks to compare with, drawn as a dashed line, after its name.
        headline: the inner step whose score is quoted. It is shaded, and the legend states its
            scores, except for runs with fewer inner steps.

    Raises:
        ValueError: `runs` is empty.

    >>> runs = {"exact": {"mean": [0.2, 0.8], "ci95": [0.01, 0.01]}}
    >>> figure = metric_per_step(runs, ylabel="accuracy", headline=1)
    >>> figure.legends[0].get_texts()[-1].get_text()
    'exact: 0.800 ± 0.010'
    """
    _check_labels("runs", runs)
    figure, (axes,) = _figure(f"{_capital(ylabel)} by inner step, with 95 % confidence intervals")
    # Bars at the same place would hide each other.
    reach = min(0.04 * (len(runs) - 1), 0.12)
    offsets = np.linspace(-reach, reach, len(runs))
    for (label, style), offset in zip(_styles(runs).items(), offsets, strict=True):
        mean, ci95 = _floats(runs[label]["mean"]), _floats(runs[label]["ci95"])
        name = label + _quoted(mean, ci95, headline)
        axes.errorbar(
            np.arange(len(mean)) + offset, mean, ci95, label=name, capsize=3, markersize=4, **style
        )
    if reference is not None:
        name, value = reference
        axes.axhline(value, label=f"{name}: {_numbers(value)}", **REFERENCE)
    if headline is not None:
        name = f"headline: {headline} inner step{'s' * (headline != 1)}"
        axes.axvspan(headline - 0.4, headline + 0.4, color="0.92", zorder=0, label=name)
    _finish(axes, "inner step", ylabel, [run["mean"] for run in runs.values()])
    _legend_below(figure)
    return figure


def gradient_agreement(
    step: Numbers,
    cosine: Numbers,
    norm_ratio: Numbers,
    *,
    layers: Mapping[str, Mapping[str, Numbers]] | None = None,
) -> Figure:
    """Draws the agreement of the first-order meta-gradient with the exact one along a run.

    Args:
        step: outer steps at which both were computed, `[num_points]`.
        cosine: cosine of the angle between the two, `[num_points]`.
        norm_ratio: norm of the first-order meta-gradient over that of the exact one,
            `[num_points]`.
        layers: layer -> {"cosine": [...], "norm_ratio": [...]}, drawn as one thin line per layer.

    >>> figure = gradient_agreement([0, 100], [0.9, 0.7], [1.2, 1.5])
    >>> [axes.get_ylabel() for axes in figure.axes]
    ['cosine', 'norm, first / exact']
    """
    figure, panels = _figure("First-order against exact meta-gradient", num_panels=2)
    labels = {"cosine": "cosine", "norm_ratio": "norm, first / exact"}
    for axes, values, (name, label) in zip(
        panels, (cosine, norm_ratio), labels.items(), strict=True
    ):
        axes.axhline(1.0, label="both gradients equal", **REFERENCE)
        for color, (layer, found) in zip(cycle(OTHER_COLORS), (layers or {}).items()):
            axes.plot(_floats(step), _floats(found[name]), color=color, linewidth=1, label=layer)
        axes.plot(
            _floats(step),
            _floats(values),
            color=LEARNER_COLORS["first"],
            marker="o",
            markersize=3,
            label="whole gradient" if layers else "first order, along the exact run",
        )
        drawn = [values, *(found[name] for found in (layers or {}).values())]
        _finish(axes, "outer step", label, drawn)
    panels[0].set_xlabel("")
    _legend_below(figure)
    return figure


def episode(support_images: Any, query_images: Any, predictions: Any = None) -> Figure:
    """Draws one episode: one row per class, with support images left and query images right.

    High values of grayscale images are drawn dark, since ink is 1 in the built-in data.

    Args:
        support_images: `[way, shot, height, width, channels]` with one channel or three; integers up
            to 255, or floats, which are rescaled to [0, 1] if they leave this range.
        query_images: `[way, query, height, width, channels]`.
        predictions: `[way, query]`, the class that the adapted model predicts for each query image.
            Right predictions are framed green, wrong ones red, with the number of the class.

    Raises:
        ValueError: the arrays do not fit together.

    >>> support, query = np.zeros((5, 1, 28, 28, 1)), np.zeros((5, 3, 28, 28, 1))
    >>> figure = episode(support, query, np.zeros((5, 3), int))
    >>> figure.get_suptitle()
    '5-way 1-shot episode: 3 of 15 query images right'
    """
    support_images, query_images = np.asarray(support_images), np.asarray(query_images)
    _check_episode(support_images, query_images)
    (way, shot), query = support_images.shape[:2], query_images.shape[1]
    starts = np.arange(shot + query) * CELL_STRIDE + GAP * (np.arange(shot + query) >= shot)
    figure, axes = _canvas(starts[-1] + 1, way * CELL_STRIDE)
    images = np.concatenate([_displayable(support_images, query_images)], axis=1)
    for row, column in np.ndindex(way, shot + query):
        _draw_image(axes, images[row, column], starts[column], row * CELL_STRIDE)
    _draw_headings(axes, way, starts, shot)
    title = f"{way}-way {shot}-shot episode"
    if predictions is not None:
        right = _draw_predictions(axes, np.asarray(predictions), (way, query), starts[shot:])
        title += f": {right} of {way * query} query images right"
    figure.suptitle(title, fontsize="large")
    return figure


def regression(x_grid: Any, curves: Mapping[str, Any], support_x: Any, support_y: Any) -> Figure:
    """Draws one regression task: the true curve, and the model before and after adaptation.

    Args:
        x_grid: inputs of the curves, `[num_points]` or `[num_points, 1]`.
        curves: name -> outputs at `x_grid`, of the same size, in the order of adaptation, such as
            "before", "after 1 step", "after 10 steps". "truth" is drawn in black.
        support_x: inputs of the support, `[shot]` or `[shot, 1]`.
        support_y: targets of the support, of the same size.

    Raises:
        ValueError: `curves` is empty.

    >>> x = np.linspace(-5, 5, 50)
    >>> figure = regression(x, {"truth": np.sin(x), "before": 0 * x}, x[::10], np.sin(x[::10]))
    >>> [text.get_text() for text in figure.legends[0].get_texts()]
    ['truth', 'before', 'support']
    """
    _check_labels("curves", curves)
    figure, (axes,) = _figure("One task, before and after adaptation")
    models = [name for name in curves if name != "truth"]
    shades = matplotlib.colormaps["cividis"](np.linspace(0.85, 0.1, len(models)))
    styles = {"truth": {"color": "black", "linewidth": 2.5, "alpha": 0.9, "linestyle": ":"}} | {
        name: {"color": shade, "linewidth": 1.8} for name, shade in zip(models, shades, strict=True)
    }
    for name, y in curves.items():
        axes.plot(np.ravel(x_grid), np.ravel(y), label=name, **styles[name])
    axes.plot(
        np.ravel(support_x),
        np.ravel(support_y),
        "o",
        color=LEARNER_COLORS["first"],
        label="support",
        zorder=3,
    )
    _finish(axes, "x", "y", [])
    _legend_below(figure)
    return figure


def check_format(path: str | os.PathLike[str]) -> None:
    """Raises ValueError unless the suffix of a path is one of `FORMATS`.

    >>> check_format("plot.png")
    """
    if Path(path).suffix.lower().removeprefix(".") not in FORMATS:
        raise ValueError(
            f"{os.fspath(path)!r} must be the name of a file with a suffix: .{', .'.join(FORMATS)}"
        )


def save(figure: Figure, path: str | os.PathLike[str], *, replace: bool = False) -> None:
    """Writes a figure in the format of the path's suffix, whole or not at all.

    Args:
        figure: the figure.
        path: the file to write.
        replace: whether an existing file is replaced.

    Raises:
        ValueError: the file exists and is not to be replaced, or cannot be written, or the suffix is
            not one of `FORMATS`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(gradient_agreement([0], [1.0], [1.0]), f"{folder}/plot.png")
    ...     os.listdir(folder)
    ['plot.png']
    """
    path = Path(path)
    check_format(path)
    with atomic_write(path, replace=replace) as file:
        figure.savefig(file, format=path.suffix.removeprefix("."), dpi=150)


def _figure(title: str, num_panels: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(6.4, 4.2 + 1.2 * (num_panels - 1)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize="large")
    return figure, list(figure.subplots(num_panels, 1, sharex=True, squeeze=False)[:, 0])


def _finish(axes: Axes, xlabel: str, ylabel: str, values: Iterable[Numbers]) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(textwrap.fill(ylabel, 36))
    axes.xaxis.set_major_locator(MaxNLocator(12, steps=[1, 2, 5, 10], integer=True))
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # On a linear axis, one diverged run would flatten all the others.
    finite = np.concatenate([[], *(_floats(value) for value in values)])
    finite = finite[np.isfinite(finite)]
    if finite.size and finite.min() > 0 and finite.max() > 1000 * finite.min():
        axes.set_yscale("log")


def _legend_below(figure: Figure) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = 3 if max(map(len, labels)) < 22 else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _styles(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns the style of each label: colors are learners, lines and markers rates and seeds.

    Both are assigned in the order of appearance. If there are more learners than colors, the colors
    start again with the next line and marker.
    """
    own_names = {label: re.split("[@,]", label)[0] for label in labels}
    names = dict.fromkeys(own_names.values())
    others = [name for name in names if name not in LEARNER_COLORS]
    colors = LEARNER_COLORS | dict(zip(others, cycle(OTHER_COLORS), strict=False))
    rounds = {name: i // len(OTHER_COLORS) for i, name in enumerate(others)}
    own_rates = {label: label.removeprefix(name) for label, name in own_names.items()}
    rates = list(dict.fromkeys(own_rates.values()))
    styles = {}
    for label, name in own_names.items():
        number = rates.index(own_rates[label]) + rounds.get(name, 0) * len(rates)
        line, marker = VARIANTS[number % len(VARIANTS)]
        styles[label] = {"color": colors[name], "linestyle": line, "marker": marker}
    return styles


def _floats(values: Numbers) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], float)


def _numbers(value: float, *others: float) -> str:
    """Returns numbers with the digits that suit the first one."""
    size = abs(value)
    digits = ".3f" if size < 10 else ".1f" if size < 1000 else ".2e"
    return " ± ".join(format(number, digits) for number in (value, *others))


def _quoted(mean: np.ndarray, ci95: np.ndarray, headline: int | None) -> str:
    if headline is None or headline >= len(mean):
        return ""
    if not np.isfinite(mean[headline]):
        return ": not finite"
    return f": {_numbers(mean[headline], ci95[headline])}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _check_labels(name: str, mapping: Mapping[str, Any]) -> None:
    if not mapping:
        raise ValueError(f"{name} is empty: at least one entry is needed")


def _check_episode(support_images: np.ndarray, query_images: np.ndarray) -> None:
    for name, images in (("support_images", support_images), ("query_images", query_images)):
        if images.ndim != 5 or images.shape[-1] not in (1, 3):
            raise ValueError(
                f"{name} must be [way, examples, height, width, channels] with 1 or 3 channels; "
                f"got shape {images.shape}"
            )
    if support_images.shape[0] != query_images.shape[0]:
        raise ValueError(
            f"query_images must have as many classes as support_images; got "
            f"{query_images.shape[0]} and {support_images.shape[0]}"
        )


def _displayable(support_images: np.ndarray, query_images: np.ndarray) -> np.ndarray:
    """Returns both side by side, `[way, shot + query, height, width, channels]` in [0, 1]."""
    images = np.concatenate([support_images, query_images], axis=1)
    if np.issubdtype(images.dtype, np.integer):
        return images / 255
    low, high = min(0.0, images.min()), max(1.0, images.max())
    return (images - low) / (high - low)


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Returns an empty drawing area. Its unit is one image, and y points down."""
    inches = (CELL_INCHES * (width + 1.0), CELL_INCHES * (height + 1.3))
    figure = Figure(figsize=(max(inches[0], 4.6), inches[1]), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(aspect="equal", xlim=(-0.9, width + 0.1), ylim=(height, -0.55))
    axes.set_axis_off()
    return figure, axes


def _draw_image(axes: Axes, image: np.ndarray, x: float, y: float) -> None:
    pixels = 1 - image.repeat(3, -1) if image.shape[-1] == 1 else image
    axes.imshow(pixels, extent=(x, x + 1, y + 1, y), interpolation="nearest")
    axes.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor="0.75", linewidth=0.6))


def _draw_headings(axes: Axes, way: int, starts: np.ndarray, shot: int) -> None:
    for row in range(way):
        axes.text(-0.25, row * CELL_STRIDE + 0.5, str(row), ha="right", va="center")
    for columns, heading in ((starts[:shot], "support"), (starts[shot:], "query")):
        axes.text((columns[0] + columns[-1] + 1) / 2, -0.3, heading, ha="center", va="center")


def _draw_predictions(
    axes: Axes, predictions: np.ndarray, shape: tuple[int, int], starts: np.ndarray
) -> int:
    if predictions.shape != shape:
        raise ValueError(
            f"predictions must have shape [way, query] = {shape}; got {predictions.shape}"
        )
    right = predictions == np.arange(shape[0])[:, None]
    for row, column in np.ndindex(*shape):
        x, y = float(starts[column]), row * CELL_STRIDE
        color = RIGHT_COLOR if right[row, column] else WRONG_COLOR
        frame = Rectangle((x, y), 1, 1, fill=False, edgecolor=color, linewidth=2.2)
        axes.add_patch(frame)
        if not right[row, column]:
            axes.text(
                x + 0.96, y + 0.04, str(predictions[row, column]), ha="right", va="top",
                color="white", fontsize="small", fontweight="bold",
                bbox={"facecolor": color, "edgecolor": "none", "pad": 1.5},
            )  # fmt: skip
    return int(right.sum())
