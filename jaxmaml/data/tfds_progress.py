"""The progress of TFDS as stages: TFDS prints bars, which a library and a log file do not want."""

import contextlib
import io
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from jaxmaml import stages


@contextlib.contextmanager
def as_stages() -> Iterator[None]:
    """Turns the progress bars of TFDS into stages, and drops what else it prints, during the block.

    Example:
        >>> with as_stages():
        ...     print("Downloading and preparing dataset ...")
    """
    from tensorflow_datasets.core.utils import tqdm_utils

    before: Any = tqdm_utils.tqdm_lib
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(io.StringIO()) as out:
        tqdm_utils.tqdm_lib = SimpleNamespace(tqdm=_bar_class(nowhere))
        try:
            with contextlib.redirect_stderr(out):
                yield
        finally:
            tqdm_utils.tqdm_lib = before


def _bar_class(nowhere: Any) -> Any:
    """Returns a class of bars that draw nothing: each is a stage from its begin to its end."""
    from tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            # The stage before the bar, which shows itself at once.
            self._open = contextlib.ExitStack()
            self._advance, self._shown = None, 0
            super().__init__(*args, **{**kwargs, "file": nowhere})

        def display(self, *args: Any, **kwargs: Any) -> None:
            # A total may become known later, and then the stage is another one.
            total = None if self.total is None else int(self.total)
            if self._advance is None or total != self._total:
                self._open.close()
                self._total, self._shown = total, 0
                what = f"{self.desc.strip(' :.')} ({self.unit.strip()})"
                self._advance = self._open.enter_context(stages.stage(what, total))
            self._advance(int(self.n) - self._shown)
            self._shown = int(self.n)

        def close(self) -> None:
            self._open.close()
            super().close()

    return Bar
