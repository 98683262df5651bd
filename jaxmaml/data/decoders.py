"""Decoders: encoded images become arrays of one size, decoded when they are asked for.

Every image, whatever its mode, becomes 8 bits per channel, upright, on white, in this order:

1. The first frame of an animation is read.
2. The image is turned as its EXIF orientation says. EXIF that cannot be read counts as absent.
3. 16-bit gray is rescaled from 0..65535 to 0..255, and rounded. 16-bit color, of which Pillow keeps
   the upper 8 bits, is truncated. Modes whose range is not known (32-bit integers and floating-point
   numbers) are refused, and so is a transparent color among 16-bit colors.
4. Transparent pixels are composited on white: alpha channels, palettes with transparency, and the
   transparent color of a PNG or GIF.
5. The image is converted to the channels of the format, and then resized.
6. Where the format is ink, pixels darker than middle gray become 255, and the others 0.
"""

import contextlib
import dataclasses
import io
from typing import Any, Literal, Protocol

import numpy as np

from jaxmaml import files, stages
from jaxmaml.data.records import Encoded

IMAGES_PER_CHUNK = 1000
"""Images decoded at a time, which bounds the memory of reading a whole dataset."""
RULES = 3
"""The version of the rules above, which a cache of decoded images depends on."""
INK_BELOW = 128
"""Gray values below this one are ink. A scan or a JPEG of a drawing has few that are exactly 0."""
BACKGROUND = (255, 255, 255, 255)
"""The color behind transparent pixels."""


@dataclasses.dataclass(frozen=True)
class Format:
    """The form that encoded images are decoded to.

    Attributes:
        size: height and width, in pixels.
        mode: "L" for one channel, "RGB" for three.
        resample: "nearest", which keeps a binary image binary, or "bilinear".
        ink: whether the image is a dark drawing on white, and becomes 255 where there is ink and 0
            elsewhere.

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

    def read(self, numbers: np.ndarray, /) -> np.ndarray:
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
        >>> from jaxmaml.data.folders import FolderRecords
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     Path(directory, "cat").mkdir()
        ...     Image.new("RGB", (9, 7)).save(Path(directory, "cat", "0.png"))
        ...     Decoder(FolderRecords(Path(directory)), Format(6)).read(np.array([0])).shape
        (1, 6, 6, 3)
    """

    def __init__(self, records: Encoded, format: Format):
        self.records, self.format, self.shape = records, format, format.shape

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """Returns uint8 `[len(numbers), H, W, C]`.

        Raises:
            files.ReadError: a record cannot be read or decoded. The message names its file and number.
        """
        images = np.empty((len(numbers), *self.shape), np.uint8)
        for first in range(0, len(numbers), IMAGES_PER_CHUNK):
            chunk = numbers[first : first + IMAGES_PER_CHUNK].tolist()
            for place, encoded in enumerate(self.records.encoded(chunk), start=first):
                images[place] = self._decode(encoded, numbers[place])
        return images

    def _decode(self, encoded: bytes, number: int) -> np.ndarray:
        # Pillow, because TFDS would expand gray images to three channels.
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(io.BytesIO(encoded)) as image:
                decoded = _resized(_plain(image, self.format.mode), self.format)
        except Exception as error:  # Pillow raises errors of many types for a damaged file
            # Pillow names the object in memory, not the file.
            is_unknown = isinstance(error, UnidentifiedImageError)
            problem = "not an image that Pillow can read" if is_unknown else error
            where = self.records.where(int(number))
            raise files.ReadError(f"{where}: image cannot be decoded: {problem}") from error
        if self.format.ink:
            return np.where(decoded < INK_BELOW, 255, 0).astype(np.uint8)
        return decoded


def read_all(reader: Reader, number: int) -> np.ndarray:
    """Returns the first images of a reader, uint8 `[number, H, W, C]`, and is a stage; see `stages`.

    Example:
        >>> from jaxmaml.data import stored_images
        >>> images = stored_images.from_arrays(np.zeros((3, 8, 8, 1), np.uint8), [1, 0, 1], "ab")
        >>> read_all(images, 2).shape
        (2, 8, 8, 1)
    """
    images = np.empty((number, *reader.shape), np.uint8)
    with stages.stage("decoding images", number) as advance:
        for first in range(0, number, IMAGES_PER_CHUNK):
            rows = np.arange(first, min(first + IMAGES_PER_CHUNK, number))
            images[rows] = reader.read(rows)
            advance(len(rows))
    return images


_WIDENING = {"L;4": 17, "L;2": 85}
"""The factor of the gray values of a PNG with fewer bits, by Pillow's raw mode."""
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
"""Tags of a TIFF."""


def _plain(image: Any, mode: str) -> Any:
    """Returns an image in "L" or "RGB", by the rules at the top of this module."""
    from PIL import Image, ImageOps

    # The transparent color has 16 bits, but Pillow keeps 8 of the pixels.
    is_color = isinstance(image.info.get("transparency"), tuple)
    if is_color and any("16" in str(tile[3]) for tile in image.tile):
        raise ValueError("16-bit color with a transparent color; save it with an alpha channel")

    # Pillow widens the pixels of 2 and 4 bits to 8, but not their transparent value.
    transparent, raw_modes = image.info.get("transparency"), {str(tile[3]) for tile in image.tile}
    if isinstance(transparent, int) and image.mode == "L":
        image.info["transparency"] = transparent * next(
            (factor for raw, factor in _WIDENING.items() if raw in raw_modes), 1
        )

    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF raises errors of many types
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG"):
        image = _rescaled(image)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"the range of mode {image.mode!r} is not known; save it with 8 or 16 bits"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    return image.convert(mode)


def _rescaled(image: Any) -> Any:
    """Returns a 16-bit gray image with 8 bits, and an alpha channel if a value is transparent."""
    from PIL import Image

    # The samples of a TIFF may have 12 bits in 16.
    tags = getattr(image, "tag_v2", {})
    num_bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    values = np.asarray(image)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts 8 bits only
        values = 2**num_bits - 1 - values
    gray = Image.fromarray(np.rint(values * (255 / (2**num_bits - 1))).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is None:
        return gray
    alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
    return Image.merge("LA", (gray, Image.fromarray(alpha)))


def _resized(image: Any, format: Format) -> np.ndarray:
    from PIL import Image

    if image.size != (format.size,) * 2:
        method = Image.Resampling[format.resample.upper()]
        image = image.resize((format.size,) * 2, method)
    decoded = np.asarray(image)
    return decoded[..., None] if format.mode == "L" else decoded
