"""Decoders: encoded images become arrays of one size, decoded when they are asked for."""

import dataclasses
import io
from typing import Any, Literal, Protocol

import numpy as np

from jaxmaml import files
from jaxmaml.data.records import Records

IMAGES_PER_CHUNK = 1000
"""Images decoded at a time, which bounds the memory of reading a whole dataset."""


@dataclasses.dataclass(frozen=True)
class Format:
    """The form that encoded images are decoded to.

    Attributes:
        size: height and width, in pixels.
        mode: "L" for one channel, "RGB" for three.
        resample: "nearest", which keeps a binary image binary, or "bilinear".
        ink: whether the image is binary with ink 0, and becomes 255 where there is ink.

    Example:
        >>> Format(28, "L").shape
        (28, 28, 1)
    """

    size: int
    mode: Literal["L", "RGB"] = "RGB"
    resample: Literal["nearest", "bilinear"] = "bilinear"
    ink: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.size, self.size, 1 if self.mode == "L" else 3


class Reader(Protocol):
    """Returns decoded images by record number. It is safe in threads and in other processes.

    Attributes:
        shape: (height, width, channels) of an image.

    Example:
        >>> from jaxmaml.data import stored_images
        >>> reader: Reader = stored_images.InMemory(np.zeros((9, 8, 8, 1), np.uint8))
        >>> reader.read(np.array([3, 1])).shape
        (2, 8, 8, 1)
    """

    @property
    def shape(self) -> tuple[int, int, int]: ...

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """Returns uint8 `[len(numbers), H, W, C]`."""
        ...


class Decoder:
    """A `Reader` that decodes records when they are asked for.

    Args:
        records: the encoded images.
        format: the form that they are decoded to.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from jaxmaml.data.records import FolderRecords
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     Path(directory, "cat").mkdir()
        ...     Image.new("RGB", (9, 7)).save(Path(directory, "cat", "0.png"))
        ...     Decoder(FolderRecords(Path(directory)), Format(6)).read(np.array([0])).shape
        (1, 6, 6, 3)
    """

    def __init__(self, records: Records, format: Format):
        self.records, self.format, self.shape = records, format, format.shape

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """Returns uint8 `[len(numbers), H, W, C]`.

        Raises:
            ValueError: a record cannot be read or decoded. The message names its file and number.
        """
        images = np.empty((len(numbers), *self.shape), np.uint8)
        for first in range(0, len(numbers), IMAGES_PER_CHUNK):
            chunk = numbers[first : first + IMAGES_PER_CHUNK].tolist()
            for place, encoded in enumerate(self.records.encoded(chunk), start=first):
                images[place] = self._decode(encoded, numbers[place])
        return images

    def _decode(self, encoded: bytes, number: int) -> np.ndarray:
        # Pillow, because TFDS would expand gray images to three channels.
        from PIL import Image

        try:
            with Image.open(io.BytesIO(encoded)) as image:
                decoded = _resized(image, self.format)
        except Exception as error:  # Pillow raises errors of many types for a damaged file
            where = self.records.where(int(number))
            raise files.ReadError(f"{where}: image cannot be decoded: {error}") from error
        return np.where(decoded > 0, 0, 255).astype(np.uint8) if self.format.ink else decoded


def _resized(image: Any, format: Format) -> np.ndarray:
    from PIL import Image

    if format.resample == "nearest":
        resized = image.resize((format.size,) * 2, Image.Resampling.NEAREST)
        decoded = np.asarray(resized.convert(format.mode))
    else:
        converted = image.convert(format.mode)
        if converted.size != (format.size,) * 2:
            converted = converted.resize((format.size,) * 2, Image.Resampling.BILINEAR)
        decoded = np.asarray(converted)
    return decoded[..., None] if format.mode == "L" else decoded
