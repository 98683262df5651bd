"""Every notebook runs from top to bottom, and shows a picture.

The default tests run the first one, and look up in the others whether what they call exists.
"""

import ast
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

DIRECTORY = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(DIRECTORY.glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_the_first_notebook_runs_with_few_outer_steps() -> None:
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    replaced = [_replace_outer_steps(cell, "20") for cell in notebook.cells]
    assert sum(replaced) == 1
    _check(_executed(notebook))


@each_notebook
def test_what_a_notebook_calls_exists(path: Path) -> None:
    tree = ast.parse(_code(path))
    imported = _imported(tree)
    assert "jaxmaml" in imported
    _check_names(tree, imported)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import jaxmaml\njaxmaml.no_such_name", "no_such_name"),
        ("from jaxmaml import plots as p\np.curve()", "plots"),
        ("import jaxmaml\njaxmaml.maml(f, flor=1)", "flor"),
    ],
)
def test_what_does_not_exist_is_found(code: str, message: str) -> None:
    tree = ast.parse(code)
    with pytest.raises((AttributeError, TypeError), match=message):
        _check_names(tree, _imported(tree))


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


def _code(path: Path) -> str:
    """The Python of a notebook, without the lines of IPython."""
    cells = [
        cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"
    ]
    lines = "\n".join(cell for cell in cells if not cell.startswith("%%")).splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


def _imported(tree: ast.AST) -> dict[str, Any]:
    """The values that a program imports, by their names there."""
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            try:
                exec(compile(ast.Module([node], []), "notebook", "exec"), names)
            except ImportError as error:
                raise AttributeError(str(error)) from error
    return names


def _check_names(tree: ast.AST, imported: dict[str, Any]) -> None:
    """Checks the attributes of all that is imported, and the keywords of calls of jaxmaml."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            _value(node, imported)
        elif isinstance(node, ast.Call):
            called = _value(node.func, imported)
            if getattr(called, "__module__", "").startswith("jaxmaml"):
                # The positions may be starred.
                given = {word.arg: None for word in node.keywords if word.arg is not None}
                inspect.signature(called).bind_partial(**given)


def _value(node: ast.expr, imported: dict[str, Any]) -> Any:
    """The value of a chain of attributes, or None if it does not begin with an import."""
    if isinstance(node, ast.Name):
        return imported.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    owner = _value(node.value, imported)
    known = isinstance(owner, ModuleType) or inspect.isclass(owner)
    return getattr(owner, node.attr) if known else None


def _executed(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    client = NotebookClient(notebook, timeout=540, kernel_name="python3")
    return client.execute(cwd=str(DIRECTORY))


def _check(notebook: nbformat.NotebookNode) -> None:
    """Checks the outputs of a notebook: no error, and at least one picture."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
