"""Every notebook runs from top to bottom, and shows a picture."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

DIRECTORY = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(DIRECTORY.glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each_notebook
def test_notebook_with_few_outer_steps(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    replaced = [_replace_outer_steps(cell, "20") for cell in notebook.cells]
    assert sum(replaced) == 1
    _check(_executed(notebook))


@pytest.mark.slow
@each_notebook
def test_notebook(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A notebook trains, so that it computes more than it compiles: with all of LLVM's work.
    monkeypatch.delenv("XLA_FLAGS")
    _check(_executed(nbformat.read(path, as_version=4)))


@each_notebook
def test_notebook_was_executed(path: Path) -> None:
    _check(nbformat.read(path, as_version=4))


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


def _replace_outer_steps(cell: nbformat.NotebookNode, number: str) -> int:
    """Replaces the line `NUM_OUTER_STEPS = ...` of a cell, and returns how many there were."""
    pattern = re.compile(r"^(NUM_OUTER_STEPS = )\d+$", re.MULTILINE)
    cell.source, count = pattern.subn(rf"\g<1>{number}", cell.source)
    return count


def _executed(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    client = NotebookClient(notebook, timeout=540, kernel_name="python3")
    return client.execute(cwd=str(DIRECTORY))


def _check(notebook: nbformat.NotebookNode) -> None:
    """Checks the outputs of a notebook: no error, and at least one picture."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
