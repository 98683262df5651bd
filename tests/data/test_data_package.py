"""The package `jaxmaml.data`: what it exports, what it loads, and that imports have no cycles."""

import ast
import graphlib
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import jaxmaml.data

PACKAGE = Path(jaxmaml.data.__file__).parent
EXPORTED = (
    "augmentation", "class_splits", "datasets", "episodes", "pools", "sinusoid", "stored_images",
    "stream", "variable",
)  # fmt: skip


@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_name_is_the_module(name):
    assert getattr(jaxmaml.data, name) is importlib.import_module(f"jaxmaml.data.{name}")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        jaxmaml.data.no_such_name  # noqa: B018


def test_grain_loads_with_the_first_use_of_streams():
    code = (
        "import sys, jaxmaml.data; assert 'grain' not in sys.modules; "
        "jaxmaml.data.stream; assert 'grain' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_two_modules_import_each_other_not_even_for_their_types():
    imports = {}
    for path in PACKAGE.glob("*.py"):
        if path.stem == "__init__":
            continue
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "jaxmaml.data":
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "jaxmaml.data."
            ):
                names.add(str(node.module).split(".")[2])
        imports[path.stem] = names - {"builders"}  # they load when they are first used
    order = list(graphlib.TopologicalSorter(imports).static_order())  # raises CycleError
    assert order.index("label_cache") < order.index("records") < order.index("datasets")
