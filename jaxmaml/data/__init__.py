"""Tasks: images on the device or streamed from disk, sinusoids, and the data sets there are.

`stream` is loaded when it is first used: it needs grain.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxmaml.data import pools as pools
from jaxmaml.data import sinusoid as sinusoid
from jaxmaml.data import sources as sources
from jaxmaml.data import variable as variable

if TYPE_CHECKING:
    from jaxmaml.data import stream as stream


def __getattr__(name: str) -> Any:
    if name != "stream":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("jaxmaml.data.stream")
