"""CSV files of points, for regression: x and y of a support, x of what is predicted."""

import csv
import math
import pathlib
from collections.abc import Sequence

import numpy as np


def read(path: pathlib.Path, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the columns of a CSV file with a header, float32 `[num_rows]` each.

    Args:
        path: the file.
        columns: its columns, in any order.

    Raises:
        ValueError: the file cannot be read, has other columns, no rows, or a value that is not a
            finite number; the message names the line.
    """
    lines = _lines(path)
    header = [name.strip() for name in lines[0][1]] if lines else []
    if sorted(header) != sorted(columns):
        raise ValueError(
            f"{path} must have a first line with the columns {','.join(columns)}; it has "
            f"{','.join(header)[:100] or 'nothing'}"
        )
    if len(lines) == 1:
        raise ValueError(f"{path} has no points below its first line")
    rows = [_numbers(path, number, header, cells) for number, cells in lines[1:]]
    values = np.array(rows, np.float32)
    return {name: values[:, column] for column, name in enumerate(header)}


def _lines(path: pathlib.Path) -> list[tuple[int, list[str]]]:
    """Returns the number and the cells of each line that is not empty."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            return [(reader.line_num, cells) for cells in reader if any(map(str.strip, cells))]
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8: {error}") from None


def _numbers(
    path: pathlib.Path, number: int, header: Sequence[str], cells: Sequence[str]
) -> list[float]:
    """Returns the numbers of a line."""
    if len(cells) != len(header):
        raise ValueError(
            f"{path}, line {number} has {len(cells)} values for the {len(header)} columns "
            f"{','.join(header)}"
        )
    return [_number(path, number, name, cell) for name, cell in zip(header, cells, strict=True)]


def _number(path: pathlib.Path, number: int, name: str, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    with np.errstate(over="ignore"):
        if not np.isfinite(np.float32(value)):
            raise ValueError(f"{path}, line {number}: {name}={cell.strip()!r:.40} is not finite")
    return value
