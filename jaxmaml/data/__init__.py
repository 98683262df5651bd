"""Tasks of images on the device or on disk, sinusoids, and the datasets that they are drawn from.

What a module is for:

- `datasets`: datasets by name; `class_splits`: which classes are train, val and test; `preparation`:
  preparing with TFDS, with `tfds_progress` for its progress; `builders`: what TFDS itself lacks.
- `records`: encoded images of a prepared dataset; `folders`: those of a folder of the user;
  `decoders`: how they become arrays; `image_cache` and `label_cache`: so that it happens once;
  `stored_images`: the images of one split, by row.
- `pools`: images on the device; `stream`: images read ahead from disk; `episodes`: which images a
  task has, for both; `variable`: tasks of varying way and shot; `augmentation`: changes of pixels.
- `sinusoid`: the regression tasks.

`stream` loads on first use, as it needs grain.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxmaml.data import augmentation as augmentation
from jaxmaml.data import class_splits as class_splits
from jaxmaml.data import datasets as datasets
from jaxmaml.data import episodes as episodes
from jaxmaml.data import pools as pools
from jaxmaml.data import sinusoid as sinusoid
from jaxmaml.data import stored_images as stored_images
from jaxmaml.data import variable as variable

if TYPE_CHECKING:
    from jaxmaml.data import stream as stream


def __getattr__(name: str) -> Any:
    if name != "stream":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("jaxmaml.data.stream")
