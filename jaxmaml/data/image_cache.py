"""The image cache: a dataset is decoded once, into a file that is mapped into memory."""

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from jaxmaml import files, stages
from jaxmaml.data.decoders import IMAGES_PER_CHUNK, RULES, Format, Reader
from jaxmaml.data.records import Records

ABANDONED_SECONDS = 24 * 3600
"""The age of a partial file that a killed process left; nobody decodes that long."""


class Cache:
    """A `Reader` of decoded images in one file. The system loads pages of it as they are used.

    Args:
        path: the file.
        num_images: the number of images in it.
        shape: (height, width, channels) of an image.

    Example:
        >>> import tempfile
        >>> from jaxmaml.data.stored_images import InMemory
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     cache = Cache(Path(directory, "images.npy"), 9, (8, 8, 1))
        ...     cache.build(InMemory(np.zeros((9, 8, 8, 1), np.uint8)))
        ...     cache.is_whole(), cache.read(np.array([3, 1])).shape
        (True, (2, 8, 8, 1))
    """

    def __init__(self, path: Path, num_images: int, shape: tuple[int, int, int]):
        self.path, self.num_images, self.shape = path, num_images, shape

    def __getstate__(self) -> dict[str, Any]:
        # The mapped file stays in this process: another process maps it again.
        return {key: value for key, value in self.__dict__.items() if key != "_images"}

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """Returns uint8 `[len(numbers), H, W, C]`."""
        return self._images[numbers]

    def is_whole(self) -> bool:
        """Returns whether the file exists and has the right type, shape and size."""
        try:
            images = files.map_array(self.path)
        except (OSError, ValueError, EOFError):
            return False
        return images.shape == (self.num_images, *self.shape) and images.dtype == np.uint8

    def build(self, reader: Reader) -> None:
        """Decodes all images in chunks. The file appears when it is complete.

        Args:
            reader: reads the images 0..num_images-1.

        Raises:
            ValueError: an image cannot be read.
            files.WriteError: the file cannot be written.
        """
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.num_images, *self.shape)}
        files.remove_partial(self.path, min_age=ABANDONED_SECONDS)
        decoding = stages.stage("decoding images, once", self.num_images)
        with files.atomic_write(self.path) as file, decoding as advance:
            np.lib.format.write_array_header_1_0(file, header)
            for first in range(0, self.num_images, IMAGES_PER_CHUNK):
                last = min(first + IMAGES_PER_CHUNK, self.num_images)
                file.write(reader.read(np.arange(first, last)).tobytes())
                advance(last - first)

    @functools.cached_property
    def _images(self) -> np.ndarray:
        return files.map_array(self.path)


def cached(records: Records, decoder: Reader, format: Format) -> Reader:
    """Returns the cache of a dataset in the user's cache directory, built if it is not whole.

    Where the cache cannot be written, the result is the decoder, with a warning: the images are the
    same, and are decoded each time.

    Args:
        records: the encoded images. The cache is another one when their files change.
        decoder: decodes them.
        format: the form that they are decoded to.

    Raises:
        ValueError: an image cannot be read.

    Example:
        >>> from jaxmaml.data import datasets
        >>> datasets.images("glyphs")["val"].reader.path.suffix  # a `Cache`
        '.npy'
    """
    key = files.digest(records.fingerprint, format, RULES)
    path = files.cache_dir() / "images" / f"{records.name.replace('/', '-')}-{key}.npy"
    cache = Cache(path, len(records), format.shape)
    try:
        if not cache.is_whole():
            cache.build(decoder)
    except files.WriteError as error:
        warnings.warn(f"images are decoded each time they are used: {error}", stacklevel=2)
        return decoder
    return cache
