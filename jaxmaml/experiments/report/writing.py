"""The folder of a report."""

import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence

from jaxmaml import stages
from jaxmaml.experiments.report import contents, html, markdown, saved_runs
from jaxmaml.experiments.report.blocks import Listing, Report
from jaxmaml.files import WriteError

PAGE, TEXT, TABLE = "report.html", "report.md", "table.tex"
"""The files of the folder, beside the pictures of `TEXT`."""
FOLDER = "report"
"""The name of the folder if it is not given."""


def write(paths: Sequence[pathlib.Path], out: pathlib.Path | None = None) -> pathlib.Path:
    """Writes the report of some run directories, and returns its page.

    Args:
        paths: the run directories.
        out: the folder to write. It may hold an earlier report, which is replaced. Defaults to
            `FOLDER` within the run directory or, for several of them, within the working directory.

    Raises:
        ValueError: a directory holds no run, is damaged, or is named twice; or the folder holds other
            files, or is a file.
        WriteError: the folder cannot be written.
    """
    if not paths:
        raise ValueError("no RUN_DIR is given: name at least one run directory")
    folder = out or (paths[0] / FOLDER if len(paths) == 1 else pathlib.Path(FOLDER))
    with stages.stage("reading the runs"):
        directories = saved_runs.read_all(paths)
    _check_folder(folder)
    with stages.stage("drawing the report"):
        report = contents.gather(directories)
    try:
        _write(_files(report), folder)
    except OSError as error:
        raise WriteError(f"{folder} cannot be written: {error}") from error
    return folder / PAGE


def _check_folder(folder: pathlib.Path) -> None:
    """Raises ValueError if a folder holds anything but a report."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file: name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / PAGE).is_file():
        raise ValueError(f"--out {folder} holds other files than a report: name a new folder")


def _files(report: Report) -> dict[str, bytes]:
    """Returns the contents of each file. The page, which needs no other file, comes first."""
    blocks = [block for part in report.parts for block in part.blocks]
    tables = [b.text for b in blocks if isinstance(b, Listing) and b.language == "latex"]
    return {
        PAGE: html.render(report).encode(errors="replace"),
        **{f"{picture.name}.png": picture.png for picture in report.pictures},
        TABLE: "\n".join(tables).encode(errors="replace"),
        TEXT: markdown.render(report).encode(errors="replace"),
    }


def _write(files: dict[str, bytes], folder: pathlib.Path) -> None:
    """Writes files that replace those of the same name, all of them or none."""
    # What can fail happens beside the folder, which is then left as it was.
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, data in files.items():
            (temporary / name).write_bytes(data)
        folder.mkdir(exist_ok=True)
        # In their order: once the page is there, the folder is that of a report, whatever happens.
        for name in files:
            os.replace(temporary / name, folder / name)
        made = []
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
