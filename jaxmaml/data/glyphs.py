"""`glyphs`: a TFDS data set of printed characters that needs no download.

It is synthetic: each image is a character of one of the fonts that matplotlib ships, bent by a
random affine map. It stands in for Omniglot where there is no network; numbers on it compare with
nothing published. Importing this module registers the builder with TFDS:

    import jaxmaml.data.glyphs
    builder = tfds.builder("glyphs", data_dir=..., file_format="array_record")

The classes are listed in `splits/glyphs.json`, which `select` drew once, so that another version of
a font or of Pillow cannot move a character to another split.
"""

import functools
import math
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import tensorflow_datasets as tfds
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from jaxmaml.data.classes import class_list

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
"""Which split a script belongs to, by the first word of a character's Unicode name."""

NUM_DRAWINGS = 20
SIZE = 28
SEED = 0
ROTATION = 20.0  # degrees either way
SCALE = (0.75, 1.1)  # of each side by itself
SHEAR = 0.3  # either way
SHIFT = 0.08  # of the image's side, either way

_INK = 21.0  # pixels: the longer side of an undistorted character
_FONT_SIZE = 96
_OVERSAMPLING = 4
_MIN_FACES = 8
_MIN_DISTANCE = 0.15


class Glyphs(tfds.core.GeneratorBasedBuilder):
    """Letters and digits in 28x28, 20 drawings a class, split by script."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012 (TFDS reads a plain dict)

    def _info(self) -> tfds.core.DatasetInfo:
        names = [name for listed in class_list("glyphs").values() for name in listed]
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

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        listed = class_list("glyphs")
        return {
            "train": self._generate_examples(listed["train"]),
            "validation": self._generate_examples(listed["val"]),
            "test": self._generate_examples(listed["test"]),
        }

    def _generate_examples(self, names):
        for name in names:
            for i, (image, face) in enumerate(drawings(unicodedata.lookup(name))):
                # Encoding a PIL image needs no TensorFlow; encoding an array would.
                yield f"{name} {i}", {"image": image, "label": name, "face": face, "name": name}


def drawings(character: str) -> Iterator[tuple[Image.Image, str]]:
    """The 20 drawings of a character, with the face of each: ink 255 on 0, 28x28, mode "L".

    They cycle over the faces that have the character. The random numbers depend on the character
    alone, so that a class looks the same whatever other classes there are.
    """
    # RandomState's stream is frozen by NumPy's policy; default_rng's may change.
    rng = np.random.RandomState([SEED, ord(character)])
    faces = [face for face in FACES if ord(character) in _charmap(face)]
    for i in range(NUM_DRAWINGS):
        face = faces[i % len(faces)]
        ink = _ink(character, face)
        yield _place(ink, _warp(rng), SHIFT * SIZE * rng.uniform(-1, 1, 2)), face


def select() -> dict[str, list[str]]:
    """Draws the class list: what `splits/glyphs.json` holds.

    Candidates are the letters and decimal digits that at least 8 faces have and that are no
    accented variants (by decomposition, or "WITH" in the Unicode name). In order of split and code
    point, each is kept unless it looks like one kept before: the mean over the faces they share of
    the relative squared distance between their clean drawings, fitted to one size, is below 0.15.
    So Greek Alpha and Cyrillic A go, as Latin A has the shape, and so does c beside C.
    """
    splits = list(dict.fromkeys(SCRIPTS.values()))
    candidates = sorted(_candidates(), key=lambda c: (splits.index(_split(c)), c))
    distances = _distances(np.stack([_clean(character) for character in candidates]))
    kept: list[int] = []
    for i in range(len(candidates)):
        if distances[i, kept].min(initial=np.inf) >= _MIN_DISTANCE:
            kept.append(i)
    chosen = [candidates[i] for i in kept]
    return {s: [unicodedata.name(c) for c in chosen if _split(c) == s] for s in splits}


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
    """The undistorted drawing in every face, `[num_faces, SIZE * SIZE]`; zeros where absent."""
    images = np.zeros((len(FACES), SIZE * SIZE), np.float32)
    for row, face in zip(images, FACES, strict=True):
        if ord(character) in _charmap(face):
            image = _place(_ink(character, face), np.eye(2), np.zeros(2))
            row[:] = np.asarray(image, np.float32).ravel() / 255
    return images


def _distances(clean: np.ndarray) -> np.ndarray:
    """Mean over shared faces of |x - y|^2 / ((|x|^2 + |y|^2) / 2), `[n, n]`; infinite with none."""
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
    # Basic layout: with Raqm, which not every build of Pillow has, positions may differ.
    return ImageFont.truetype(_path(face), _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)


def _ink(character: str, face: str) -> Image.Image:
    """The character in white on black, cropped to its ink."""
    canvas = Image.new("L", (3 * _FONT_SIZE, 3 * _FONT_SIZE))
    ImageDraw.Draw(canvas).text((_FONT_SIZE, _FONT_SIZE), character, fill=255, font=_font(face))
    return canvas.crop(canvas.getbbox())


def _warp(rng: np.random.RandomState) -> np.ndarray:
    """A random rotation, shear and scale, `[2, 2]`."""
    angle = math.radians(rng.uniform(-ROTATION, ROTATION))
    cos, sin = math.cos(angle), math.sin(angle)
    shear = np.array([[1, rng.uniform(-SHEAR, SHEAR)], [0, 1]])
    return np.array([[cos, -sin], [sin, cos]]) @ shear @ np.diag(rng.uniform(*SCALE, 2))


def _place(ink: Image.Image, warp: np.ndarray, shift: np.ndarray) -> Image.Image:
    """Fits ink to the image's size, warps it about its centre and moves it by `shift` pixels.

    It is drawn four times too large and averaged down, which hides how a build of FreeType hints
    and how Pillow interpolates.
    """
    side = SIZE * _OVERSAMPLING
    forward = warp * (_INK * _OVERSAMPLING / max(ink.size))
    inverse = np.linalg.inv(forward)
    centre = np.full(2, side / 2) + _OVERSAMPLING * shift
    offset = np.array(ink.size) / 2 - inverse @ centre
    coefficients = np.column_stack([inverse, offset]).ravel().tolist()
    large = ink.transform(
        (side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
    )
    return large.reduce(_OVERSAMPLING)
