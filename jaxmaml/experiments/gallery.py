"""A picture of a support set, and of what a model that adapted to it predicts for other pictures."""

import io
import textwrap
import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

MAX_PER_CLASS, MAX_CLASSES, MAX_PICTURES = 8, 20, 60
"""The most pictures that are drawn, of each class of the support and of those that are predicted."""
MIN_COLUMNS, COLUMNS = 6, 8
CELL, CELL_HEIGHT, GAP = 1.0, 1.7, 0.9
"""The width and height of a cell and the height of a heading, in inches."""


def draw(
    support: np.ndarray,
    targets: np.ndarray,
    classes: Sequence[str],
    names: Sequence[str],
    images: np.ndarray,
    probabilities: np.ndarray,
    *,
    title: str,
) -> Figure:
    """Draws the support, one row per class, and below it the pictures with their predicted classes.

    A gray picture is drawn as `data show` draws it: high values dark, since ink is 255.

    Args:
        support: uint8 `[num_support, H, W, C]`.
        targets: the class of each, `[num_support]`.
        classes: the names of the classes.
        names: the name of each picture that is classified, such as that of its file.
        images: uint8 `[num_images, H, W, C]`.
        probabilities: `[num_images, num_classes]`.
        title: the title.

    >>> pictures, classes = np.zeros((2, 8, 8, 3), np.uint8), ["cat", "dog"]
    >>> support, images = (pictures, np.arange(2), classes), (["a.png", "b.png"], pictures, np.eye(2))
    >>> figure = draw(*support, *images, title="cats and dogs")
    >>> len(figure.axes)
    4
    """
    rows = [(name, support[targets == i][:MAX_PER_CLASS]) for i, name in enumerate(classes)]
    rows = rows[:MAX_CLASSES]
    num = min(len(images), MAX_PICTURES)
    columns = max(MIN_COLUMNS, *(len(found) + 1 for _, found in rows), min(COLUMNS, num))
    num_rows = -(-num // columns)
    figure = Figure(figsize=(columns * CELL, len(rows) * CELL + num_rows * CELL_HEIGHT + 2.2 * GAP))
    FigureCanvasAgg(figure)
    page = _Page(figure)

    # The support, with the name of the class in the first column.
    page.heading(textwrap.fill(title, 11 * columns))
    page.heading("support" + _left_out(len(classes), len(rows), "classes"))
    for name, found in rows:
        page.row([(image, "") for image in found], CELL, label=name)

    # The predictions.
    page.heading("predictions" + _left_out(len(images), num, "pictures"))
    lines = [
        f"{_short(name)}\n{_short(classes[int(row.argmax())])}\n{100 * row.max():.0f} %"
        for name, row in zip(names, probabilities, strict=True)
    ]
    for first in range(0, num, columns):
        last = min(first + columns, num)
        page.row([(images[i], lines[i]) for i in range(first, last)], CELL_HEIGHT)
    return figure


def png(figure: Figure) -> bytes:
    """Returns a figure as a PNG file. A character that the font lacks is drawn as a box.

    >>> png(Figure(figsize=(1, 1)))[1:4]
    b'PNG'
    """
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(file, format="png", dpi=80)
    return file.getvalue()


class _Page:
    """A figure that is filled from the top, in inches."""

    def __init__(self, figure: Figure):
        self.figure, (self.width, self.height) = figure, figure.get_size_inches()
        self.top = self.height

    def heading(self, text: str) -> None:
        self.top -= GAP * 0.5
        self._text(0.1, self.top, text, size="medium")
        self.top -= GAP * 0.2

    def row(
        self, cells: Sequence[tuple[np.ndarray, str]], height: float, label: str | None = None
    ) -> None:
        self.top -= height
        start = 0 if label is None else 1
        if label is not None:
            self._text(
                0.1, self.top + height / 2, textwrap.fill(_short(label, 24), 12), size="small"
            )
        for column, (image, line) in enumerate(cells, start=start):
            bottom = self.top + height - 0.95 * CELL
            axes = self.figure.add_axes(
                (column * CELL / self.width + 0.05 * CELL / self.width, bottom / self.height,
                 0.9 * CELL / self.width, 0.9 * CELL / self.height)
            )  # fmt: skip
            _draw_image(axes, image)
            if line:
                self._text(column * CELL + CELL / 2, bottom - 0.05, line, size="small", under=True)

    def _text(self, x: float, y: float, text: str, size: str, under: bool = False) -> None:
        # The name of a file may have bytes that are not UTF-8, which no font can draw.
        shown = text.encode(errors="replace").decode()
        self.figure.text(
            x / self.width, y / self.height, shown, fontsize=size, parse_math=False,
            ha="center" if under else "left", va="top" if under else "center",
        )  # fmt: skip


def _draw_image(axes: Axes, image: np.ndarray) -> None:
    pixels = 255 - image.repeat(3, -1) if image.shape[-1] == 1 else image
    axes.imshow(pixels, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_edgecolor("0.75")


def _short(text: str, most: int = 14) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _left_out(number: int, drawn: int, what: str) -> str:
    return "" if drawn == number else f": the first {drawn} of {number} {what}"
