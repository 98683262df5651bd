"""Imports run one way and in no circle, heavy packages load when first used, modules stay short."""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jaxmaml"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 450
HEAVY = ("flax", "tensorflow_datasets", "tensorflow", "grain", "orbax", "matplotlib", "PIL")

# A layer is a module or a package directly under jaxmaml; "jaxmaml" is the package's own __init__.
# Each group of the core imports the groups before it.
CORE = (
    ("types",),
    ("checks", "files", "stages", "padding"),
    ("scores",),
    ("trees",),
    ("collectives",),
    ("rewriting",),
    ("derivative_rules",),
    ("mixed_mode",),
    ("adjoints",),
    ("schedules",),
    ("inner_optimizers",),
    ("inner",),
    ("learners",),
    ("sources",),
    ("batching",),
    ("processes",),
    ("parallel",),
    ("outer",),
    ("metrics",),
    ("diagnostics",),
)


def _before(name: str) -> set[str]:
    """Returns the layers of the core before that of `name`."""
    rank = next(rank for rank, group in enumerate(CORE) if name in group)
    return {layer for group in CORE[:rank] for layer in group}


BELOW = {layer: _before(layer) for group in CORE for layer in group}
# `scores` serves the metrics and the losses of nn; the core computes without it.
for _layer_without_scores in set(BELOW) - {"metrics", "diagnostics"}:
    BELOW[_layer_without_scores] -= {"scores"}
_ALL_OF_CORE = set(BELOW)
_LOWEST = {"types", "trees", "checks", "files", "stages", "padding", "scores"}
# `rewriting` knows nothing of meta-learning: nn replaces the operations of models with it.
BELOW |= {"nn": _LOWEST | {"rewriting"}, "data": _LOWEST}
_ABOVE_CORE = _ALL_OF_CORE
BELOW |= dict.fromkeys(("dispatch", "checkpoint", "averaging"), _ABOVE_CORE)
BELOW["fitting"] = _ABOVE_CORE | {"dispatch"}
_LIBRARY = _ABOVE_CORE | {"dispatch", "fitting", "checkpoint", "averaging", "nn", "data"}
# The facade passes on `load`, which returns a run of the application.
BELOW["rl"] = _LIBRARY
_LIBRARY = _LIBRARY | {"rl"}
BELOW["jaxmaml"] = _LIBRARY | {"experiments"}
BELOW["experiments"] = _LIBRARY | {"jaxmaml"}
BELOW["commands"] = {"experiments", "data", "files"}
BELOW["cli"] = {"checks", "commands", "experiments", "files"}
BELOW["__main__"] = {"cli"}


def _dotted(path: Path) -> list[str]:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _layer(dotted: str) -> str:
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else "jaxmaml"


NAMES = {".".join(_dotted(path)) for path in MODULES}
"""The dotted name of every module and package."""


def _candidates(node: ast.AST, path: Path) -> list[str]:
    """Returns the dotted names that an import statement may mean, relative ones made absolute."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    # Within __init__.py one dot is the package itself, elsewhere the module's parent.
    package = _dotted(path) if path.name == "__init__.py" else _dotted(path)[:-1]
    base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
    source = ".".join(part for part in (base, node.module) if part)
    return [f"{source}.{alias.name}" for alias in node.names]


def _module_of(candidate: str, names: set[str]) -> str | None:
    """Returns the module of this package that a name is or lies in; None for other packages."""
    if candidate.split(".")[0] != "jaxmaml":
        return None
    while candidate not in names and "." in candidate:
        candidate = candidate.rpartition(".")[0]
    return candidate


def _imported(source: str, path: Path, names: set[str] = NAMES) -> set[str]:
    """Returns the modules of this package that a module imports, wherever the statement stands."""
    nodes = ast.walk(ast.parse(source))
    found = {_module_of(name, names) for node in nodes for name in _candidates(node, path)}
    return {name for name in found if name is not None}


def _circle(imports: Mapping[str, set[str]]) -> list[str]:
    """Returns modules that import one another in a circle; an empty list if there are none."""
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_a_module_imports_only_what_lies_below_it(path: Path) -> None:
    layer = _layer(".".join(_dotted(path)))
    assert layer in BELOW, f"{layer} is not in the layering table of this test"
    layers = {_layer(name) for name in _imported(path.read_text(), path)}
    above = layers - BELOW[layer] - {layer}
    assert not above, f"{_name(path)} imports {sorted(above)}, allowed: {sorted(BELOW[layer])}"


def test_every_layer_of_the_table_exists() -> None:
    assert set(BELOW) == {_layer(name) for name in NAMES}


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("inner.py", "import jaxmaml.outer", "jaxmaml.outer"),
        ("inner.py", "from jaxmaml import outer as o", "jaxmaml.outer"),
        ("inner.py", "from . import outer", "jaxmaml.outer"),
        ("inner.py", "def f():\n    from jaxmaml.data.pools import Pool", "jaxmaml.data.pools"),
        ("inner.py", "if TYPE_CHECKING:\n    from jaxmaml import nn", "jaxmaml.nn"),
        ("nn/models.py", "from ..data.pools import sampler", "jaxmaml.data.pools"),
        ("nn/__init__.py", "from .models import MLP", "jaxmaml.nn.models"),
        ("nn/__init__.py", "from .. import outer", "jaxmaml.outer"),
        ("inner.py", "import jaxmaml", "jaxmaml"),
    ],
)
def test_every_form_of_import_is_seen(path: str, source: str, expected: str) -> None:
    assert _imported(source, PACKAGE / path) == {expected}


def test_no_modules_import_one_another_in_a_circle_not_even_for_their_types() -> None:
    imports = {}
    for path in MODULES:
        name = ".".join(_dotted(path))
        # A package imports its modules, and a module is never without its package.
        packages = {name.rpartition(".")[0], "jaxmaml"}
        imports[name] = _imported(path.read_text(), path) - {name} - packages
    assert not (circle := _circle(imports)), " imports ".join(reversed(circle))


def test_a_circle_is_found() -> None:
    names = {"jaxmaml", "jaxmaml.a", "jaxmaml.b", "jaxmaml.c"}
    sources = {
        "a": "from jaxmaml import b",
        "b": "if TYPE_CHECKING:\n    from jaxmaml.c import C",
        "c": "def f():\n    from jaxmaml.a import g",
    }
    imports = {
        f"jaxmaml.{stem}": _imported(source, PACKAGE / f"{stem}.py", names)
        for stem, source in sources.items()
    }
    assert len(set(_circle(imports))) == 3
    assert not _circle(imports | {"jaxmaml.c": set()})


def test_importing_jaxmaml_loads_nothing_heavy() -> None:
    code = f"import sys, jaxmaml; print(*sorted({set(HEAVY)!r} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout.strip()) == (0, ""), run.stdout + run.stderr


def test_there_is_no_utils_module() -> None:
    folders = (PACKAGE, ROOT / "tests", ROOT / "benchmarks")
    assert not [path for folder in folders for path in folder.rglob("utils.py")]


@pytest.mark.parametrize("package", ["nn", "data", "rl", "experiments"])
def test_a_package_says_what_each_of_its_modules_is_for(package: str) -> None:
    modules = [name.split(".")[2] for name in NAMES if name.startswith(f"jaxmaml.{package}.")]
    described = ast.get_docstring(ast.parse((PACKAGE / package / "__init__.py").read_text())) or ""
    assert set(modules) <= set(re.findall(r"`(\w+)`", described))


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_a_module_can_be_read_in_one_sitting(path: Path) -> None:
    num_lines = len(path.read_text().splitlines())
    assert num_lines <= MAX_LINES, f"{_name(path)} has {num_lines} lines, allowed: {MAX_LINES}"


def test_the_modules_of_benchmarks_do_not_shadow_those_of_tests():
    """Tests of the benchmarks put that directory onto the path, where the folders of tests/ are too."""
    folders = [path for path in ROOT.joinpath("tests").rglob("*") if path.is_dir()]
    on_path = [ROOT / "tests", *(path for path in folders if not (path / "__init__.py").exists())]
    names = {entry.stem for path in on_path for entry in path.iterdir()}
    shadows = names & {path.stem for path in ROOT.joinpath("benchmarks").glob("*.py")}
    assert not shadows
