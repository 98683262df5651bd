"""Builds the HTML reference from the docstrings.

    python -m pip install -e '.[docs]' && python docs/build.py site

A warning of pdoc is an error, except where it cannot read a type of another package.
"""

import argparse
import ast
import importlib
import warnings
from pathlib import Path
from types import ModuleType

import pdoc
import pdoc.render

APPLICATION = ("jaxmaml.cli", "jaxmaml.commands", "jaxmaml.experiments")
"""The parts that are no public API."""


def main() -> None:
    """Writes the pages into a directory."""
    parser = argparse.ArgumentParser(description="Builds the HTML reference.")
    parser.add_argument("out", type=Path, help="directory to write")
    options = parser.parse_args()
    package = importlib.import_module("jaxmaml")
    for module in _modules(package):
        passed_on = _passed_on(module)
        for name in passed_on:
            setattr(module, name, getattr(module, name))  # pdoc does not see what is loaded late
        if passed_on:
            module.__all__ = [*passed_on, *_own(module)]
    pdoc.render.configure(docformat="google", footer_text=f"jaxmaml {package.__version__}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Error parsing type annotation", UserWarning)
        hidden = [f"!{name}" for name in APPLICATION]
        pdoc.pdoc(package.__name__, *hidden, output_directory=options.out)
    print(options.out / "jaxmaml.html")


def _modules(package: ModuleType) -> list[ModuleType]:
    """Returns the package and all of its public modules."""
    root = Path(package.__file__ or "").parent
    paths = [path.relative_to(root.parent).with_suffix("") for path in sorted(root.rglob("*.py"))]
    names = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    hidden = (*APPLICATION, "jaxmaml.__main__")
    return [importlib.import_module(name) for name in names if not name.startswith(hidden)]


def _passed_on(module: ModuleType) -> list[str]:
    """Returns the names of other modules that a module passes on: it imports them "as" themselves."""
    tree = ast.parse(Path(module.__file__ or "").read_text("utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = [alias.name for node in imports for alias in node.names if alias.asname == alias.name]
    return list(dict.fromkeys(names))


def _own(module: ModuleType) -> list[str]:
    """Returns the public functions and classes that a module defines."""
    is_own = lambda value: getattr(value, "__module__", None) == module.__name__
    return [n for n, value in vars(module).items() if not n.startswith("_") and is_own(value)]


if __name__ == "__main__":
    main()
