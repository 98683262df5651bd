"""What `jaxmaml` exports is there, is documented, and its examples run as they are printed."""

import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import jaxmaml

PLANNED = (
    "Task", "MetaLearner", "MetaState", "Info",
    "adapt", "trace", "maml", "init_state", "meta_grad", "meta_step", "evaluate", "fit",
    "mean_and_ci95", "accuracy", "mixed_mode", "metrics", "diagnostics", "nn", "data",
)  # fmt: skip
PUBLIC = sorted(
    {name for name in dir(jaxmaml) if not name.startswith("_")}
    - {"importlib", "TYPE_CHECKING", "Any"}
)
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(jaxmaml.__path__, "jaxmaml.", onerror=lambda name: None)
    if not module.name.endswith("__main__")
)
EXTRAS = {"tensorflow", "tensorboardX", "torch", "higher", "torchopt"}
"""Packages that only an extra of pyproject.toml installs."""


def _load(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRAS:
            raise
        pytest.skip(f"{name} needs {error.name}, which only an extra installs")


@pytest.mark.parametrize("name", PLANNED)
def test_a_planned_name_is_public(name: str) -> None:
    assert name in PUBLIC
    assert getattr(jaxmaml, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        jaxmaml.no_such_name  # noqa: B018


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_documented(name: str) -> None:
    thing = getattr(jaxmaml, name)
    text = inspect.getdoc(thing) or ""
    assert len(text) > 20
    # A NamedTuple without a docstring of its own gets its field list as one.
    assert not text.startswith(f"{name}(")


@pytest.mark.parametrize("name", ["jaxmaml", *MODULES])
def test_the_examples_in_a_module_run(name: str) -> None:
    module = _load(name)
    assert module.__doc__, f"{name} has no docstring"
    failed, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0, "see the captured output"
