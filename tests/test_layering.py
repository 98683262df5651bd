"""Imports run one way, heavy packages load when first used, and modules stay readable."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jaxmaml"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 450
HEAVY = ("flax", "tensorflow_datasets", "tensorflow", "grain", "orbax", "matplotlib", "PIL")

CORE = (
    *("types", "checks", "files", "trees", "scores", "mixed_mode", "adjoints", "schedules"),
    *("sources", "inner", "learners", "batching", "outer", "metrics", "diagnostics", "parallel"),
)
"""The layers of the core: each imports those before it."""
BELOW: dict[str, set[str]] = {layer: set(CORE[:rank]) for rank, layer in enumerate(CORE)}
BELOW |= {name: {"types", "checks", "files", "trees", "scores"} for name in ("nn", "data")}
BELOW |= {name: set(CORE) for name in ("fitting", "checkpoint", "averaging")}
BELOW["rl"] = {*CORE, "nn", "data", "fitting", "checkpoint", "averaging"}
# `jaxmaml` stands for `import jaxmaml`, which names the whole library.
BELOW["jaxmaml"] = BELOW["rl"]
BELOW["experiments"] = {*BELOW["rl"], "rl", "jaxmaml"}
BELOW["cli"] = {"experiments", "data", "files", "jaxmaml"}
BELOW["__main__"] = {"cli"}


def _dotted(path: Path) -> list[str]:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def _layer(dotted: list[str]) -> str:
    return dotted[1] if len(dotted) > 1 else "jaxmaml"


def _imported(node: ast.AST, path: Path) -> list[str]:
    """Every dotted name that an import statement may load, relative ones made absolute."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    # Within __init__.py one dot is the package itself, elsewhere the module's parent.
    package = _dotted(path) if path.name == "__init__.py" else _dotted(path)[:-1]
    base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
    source = ".".join(part for part in (base, node.module) if part)
    # `from jaxmaml import outer` loads a layer, `from jaxmaml.outer import x` names one already.
    return [f"{source}.{alias.name}" for alias in node.names] if source == "jaxmaml" else [source]


def _layers_imported(source: str, path: Path) -> set[str]:
    names = [name for node in ast.walk(ast.parse(source)) for name in _imported(node, path)]
    return {_layer(name.split(".")) for name in names if name.split(".")[0] == "jaxmaml"}


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_a_module_imports_only_what_lies_below_it(path: Path) -> None:
    layer = _layer(_dotted(path))
    assert layer in BELOW, f"{layer} is not in the layering table of this test"
    above = _layers_imported(path.read_text(), path) - BELOW[layer] - {layer}
    assert not above, f"{_name(path)} imports {sorted(above)}, allowed: {sorted(BELOW[layer])}"


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("inner.py", "import jaxmaml.outer", "outer"),
        ("inner.py", "from jaxmaml import outer as o", "outer"),
        ("inner.py", "from . import outer", "outer"),
        ("inner.py", "def f():\n    from jaxmaml.experiments.run import Run", "experiments"),
        ("nn/models.py", "from ..data.pools import sample", "data"),
        ("nn/__init__.py", "from .models import MLP", "nn"),
        ("nn/__init__.py", "from .. import outer", "outer"),
        ("inner.py", "import jaxmaml", "jaxmaml"),
    ],
)
def test_every_form_of_import_is_seen(path: str, source: str, expected: str) -> None:
    assert _layers_imported(source, PACKAGE / path) == {expected}


def test_importing_jaxmaml_loads_nothing_heavy() -> None:
    code = f"import sys, jaxmaml; print(*sorted({set(HEAVY)!r} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout.strip()) == (0, ""), run.stdout + run.stderr


def test_there_is_no_utils_module() -> None:
    folders = (PACKAGE, ROOT / "tests", ROOT / "benchmarks")
    assert not [path for folder in folders for path in folder.rglob("utils.py")]


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_a_module_can_be_read_in_one_sitting(path: Path) -> None:
    num_lines = len(path.read_text().splitlines())
    assert num_lines <= MAX_LINES, f"{_name(path)} has {num_lines} lines, allowed: {MAX_LINES}"
