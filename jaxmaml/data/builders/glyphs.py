"""`glyphs`: a TFDS dataset of printed characters that needs no download.

It is synthetic: each image is a character in one of the fonts that matplotlib ships, changed by a
random affine map. It replaces Omniglot where there is no network. Accuracies on it cannot be
compared with published ones. Importing this module registers the builder with TFDS:

    import jaxmaml.data.builders.glyphs
    builder = tfds.builder("glyphs", data_dir=..., file_format="array_record")

The class split is in `splits/glyphs.json`, which `select` drew once, so that another version of a
font or of Pillow cannot move a character to another split.
"""

import functools
import math
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import tensorflow_datasets as tfds
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from jaxmaml.data import class_splits

FACES = tuple(
    [f"DejaVu{family}" for family in ("Sans", "Sans-Bold", "Sans-Oblique", "Sans-BoldOblique")]
    + [f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")]
    + [f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")]
    + [f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")]
)
SCRIPTS = {
    "LATIN": "train",
    "DIGIT": "train",
    "CYRILLIC": "val",
    "GREEK": "test",
    "ARMENIAN": "test",
    "GEORGIAN": "test",
    "LAO": "test",
}
"""The split of each script, which is the first word of a character's Unicode name."""

NUM_DRAWINGS = 20
SIZE = 28
SEED = 0
ROTATION = 20.0  # at most, in degrees, in both directions
SCALE = (0.75, 1.1)  # the range of the factor of each side
SHEAR = 0.3  # at most, in both directions
SHIFT = 0.08  # at most, as a fraction of the image's side, in both directions

_INK = 21.0  # the longer side of an undistorted character, in pixels
_FONT_SIZE = 96
_OVERSAMPLING = 4
_MIN_FACES = 8
_MIN_DISTANCE = 0.15


class Glyphs(tfds.core.GeneratorBasedBuilder):
    """Letters and digits in 28x28, with 20 drawings per class, split by script.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     builder = Glyphs(data_dir=directory, file_format="array_record")
        ...     builder.info.features["label"].num_classes
        559
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012 (TFDS reads a plain dict)

    def _info(self) -> tfds.core.DatasetInfo:
        class_split = class_splits.published("glyphs")
        names = [name for names in class_split.values() for name in names]
        return tfds.core.DatasetInfo(
            builder=self,
            description="Synthetic: characters of matplotlib's fonts under random affine maps.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIZE, SIZE, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=names),
                    "face": tfds.features.ClassLabel(names=list(FACES)),
                    "name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        class_split = class_splits.published("glyphs")
        return {
            "train": self._generate_examples(class_split["train"]),
            "validation": self._generate_examples(class_split["val"]),
            "test": self._generate_examples(class_split["test"]),
        }

    def _generate_examples(self, names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        for name in names:
            for i, (image, face) in enumerate(drawings(unicodedata.lookup(name))):
                # Encoding a PIL image needs no TensorFlow; encoding an array would.
                yield f"{name} {i}", {"image": image, "label": name, "face": face, "name": name}


def drawings(character: str) -> Iterator[tuple[Image.Image, str]]:
    """Draws a character 20 times: 28x28, mode "L", ink 255 on 0.

    The drawings cycle over the faces that have the character. The random numbers depend on the
    character only, so that a class looks the same whatever other classes there are.

    Args:
        character: one character.

    Yields:
        (image, face), where `face` is one of `FACES`.

    Example:
        >>> image, face = next(drawings("A"))
        >>> image.size, face
        ((28, 28), 'DejaVuSans')
    """
    # NumPy guarantees the random numbers of RandomState; those of default_rng may change.
    rng = np.random.RandomState([SEED, ord(character)])
    faces = [face for face in FACES if ord(character) in _charmap(face)]
    for i in range(NUM_DRAWINGS):
        face = faces[i % len(faces)]
        ink = _ink(character, face)
        yield _place(ink, _warp(rng), SHIFT * SIZE * rng.uniform(-1, 1, 2)), face


def select() -> class_splits.ClassSplit:
    """Returns the class split that `splits/glyphs.json` holds, computed from the fonts.

    Candidates are the letters and decimal digits that at least 8 faces have, without accented
    variants (by decomposition, or "WITH" in the Unicode name). In order of split and code point, a
    candidate is kept unless it looks like one that was kept before: their distance is less than
    0.15. The distance is the relative squared distance between their undistorted drawings in one
    size, averaged over the faces that have both. So Greek Alpha and Cyrillic A are dropped, because
    they look like Latin A, and so is c, because it looks like C.

    Returns:
        The Unicode names of "train", "val" and "test".

    Example:
        >>> sorted(select())
        ['test', 'train', 'val']
    """
    splits = list(dict.fromkeys(SCRIPTS.values()))
    candidates = sorted(_candidates(), key=lambda c: (splits.index(_split(c)), c))
    distances = _distances(np.stack([_clean(character) for character in candidates]))
    kept: list[int] = []
    for i in range(len(candidates)):
        if distances[i, kept].min(initial=np.inf) >= _MIN_DISTANCE:
            kept.append(i)
    chosen = [candidates[i] for i in kept]
    return {split: [unicodedata.name(c) for c in chosen if _split(c) == split] for split in splits}


def _split(character: str) -> str:
    return SCRIPTS.get(unicodedata.name(character, "?").split()[0], "")


def _candidates() -> list[str]:
    charmaps = [_charmap(face) for face in FACES]
    codes = sorted(frozenset().union(*charmaps))
    return [
        chr(code)
        for code in codes
        if sum(code in charmap for charmap in charmaps) >= _MIN_FACES
        and unicodedata.category(chr(code)) in ("Lu", "Ll", "Lo", "Nd")
        and _split(chr(code))
        and not unicodedata.decomposition(chr(code))
        and " WITH " not in unicodedata.name(chr(code))
    ]


def _clean(character: str) -> np.ndarray:
    """Returns the undistorted drawings, `[num_faces, SIZE * SIZE]`; 0 for a face without it."""
    images = np.zeros((len(FACES), SIZE * SIZE), np.float32)
    for row, face in zip(images, FACES, strict=True):
        if ord(character) in _charmap(face):
            image = _place(_ink(character, face), np.eye(2), np.zeros(2))
            row[:] = np.asarray(image, np.float32).ravel() / 255
    return images


def _distances(clean: np.ndarray) -> np.ndarray:
    """Returns |x - y|^2 / ((|x|^2 + |y|^2) / 2), averaged over the faces that have both, `[n, n]`.

    The distance of characters that share no face is infinite.
    """
    by_face = clean.swapaxes(0, 1)
    products = by_face @ by_face.swapaxes(1, 2)
    energy = np.diagonal(products, axis1=1, axis2=2)
    shared = (energy[:, :, None] > 0) & (energy[:, None, :] > 0)
    pair = np.where(shared, (energy[:, :, None] + energy[:, None, :]) / 2, 1)
    total = np.where(shared, 2 - 2 * products / pair, 0).sum(0)
    count = shared.sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.inf)


def _path(face: str) -> Path:
    return Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf")


@functools.cache
def _charmap(face: str) -> frozenset[int]:
    return frozenset(FT2Font(str(_path(face))).get_charmap())


@functools.cache
def _font(face: str) -> ImageFont.FreeTypeFont:
    # Basic layout: Raqm, which not every build of Pillow has, may place a character elsewhere.
    return ImageFont.truetype(_path(face), _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)


def _ink(character: str, face: str) -> Image.Image:
    """Returns the character in white on black, cropped to its ink."""
    canvas = Image.new("L", (3 * _FONT_SIZE, 3 * _FONT_SIZE))
    ImageDraw.Draw(canvas).text((_FONT_SIZE, _FONT_SIZE), character, fill=255, font=_font(face))
    return canvas.crop(canvas.getbbox())


def _warp(rng: np.random.RandomState) -> np.ndarray:
    """Returns a random rotation, shear and scale, `[2, 2]`."""
    angle = math.radians(rng.uniform(-ROTATION, ROTATION))
    cos, sin = math.cos(angle), math.sin(angle)
    shear = np.array([[1, rng.uniform(-SHEAR, SHEAR)], [0, 1]])
    return np.array([[cos, -sin], [sin, cos]]) @ shear @ np.diag(rng.uniform(*SCALE, 2))


def _place(ink: Image.Image, warp: np.ndarray, shift: np.ndarray) -> Image.Image:
    """Fits ink to the image's size, warps it about its center and moves it by `shift` pixels.

    It is drawn four times too large and then averaged, so that the hinting of FreeType and the
    interpolation of Pillow matter less.
    """
    side = SIZE * _OVERSAMPLING
    forward = warp * (_INK * _OVERSAMPLING / max(ink.size))
    inverse = np.linalg.inv(forward)
    center = np.full(2, side / 2) + _OVERSAMPLING * shift
    offset = np.array(ink.size) / 2 - inverse @ center
    coefficients = np.column_stack([inverse, offset]).ravel().tolist()
    large = ink.transform(
        (side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
    )
    return large.reduce(_OVERSAMPLING)
