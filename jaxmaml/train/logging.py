"""What a run writes: JSON without NaN, whole files or none, and never over another run."""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

RUN_FILES = ("config.json", "results.json")


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path beside `path`, renamed to it if the block succeeds, else removed.

    So an interruption leaves the old file, or none. The suffix is kept: matplotlib reads it.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_json(value: Any) -> Any:
    """`value` with arrays as lists and every non-finite number as None.

    >>> to_json({"mean": np.array([0.5, np.nan])})
    {'mean': [0.5, None]}
    """
    if isinstance(value, dict):
        return {str(name): to_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if hasattr(value, "tolist"):
        return to_json(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write `value` to `path`, whole or not at all; null stands for a non-finite number."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(to_json(value), indent=2, allow_nan=False) + "\n")


def append_jsonl(path: pathlib.Path, records: Iterable[dict[str, Any]]) -> None:
    """Append one line per record in a single write, so that no line is ever half there."""
    lines = "".join(json.dumps(to_json(record), allow_nan=False) + "\n" for record in records)
    with path.open("ab", buffering=0) as file:
        file.write(lines.encode())


def check_vacant(out: pathlib.Path) -> None:
    """Refuse an output directory that holds another run.

    Raises:
        ValueError: `out` is a file, or has a config.json or a results.json.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a directory")
    found = [name for name in RUN_FILES if (out / name).exists()]
    if found:
        raise ValueError(f"--out {out} holds another run ({found[0]}): name a new directory")


def read_config(run_dir: pathlib.Path) -> dict[str, Any]:
    """The config.json of a run.

    Raises:
        ValueError: `run_dir` holds no readable run.
    """
    path = run_dir / "config.json"
    if not path.is_file():
        raise ValueError(
            f"RUN_DIR {run_dir} holds no run (no config.json): name a directory that "
            "jaxmaml train or jaxmaml compare wrote"
        )
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
