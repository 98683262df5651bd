"""Decoders: pixels, sizes and modes, and damaged images."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxmaml import files
from jaxmaml.data.decoders import Decoder, Format
from jaxmaml.data.folders import FolderRecords

ONE_PIXEL = np.zeros((1, 1), np.uint8)


class OneImage:
    """Records of the same image."""

    def __init__(self, pixels: np.ndarray):
        self.bytes = saved(Image.fromarray(pixels))

    def encoded(self, numbers):
        return [self.bytes for _ in numbers]

    def where(self, number):
        return f"image {number}"


def saved(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(pixels, format):
    records: Any = OneImage(pixels)
    return Decoder(records, format).read(np.arange(2))


def decoded_bytes(encoded, format):
    """Returns the pixels `[H, W, C]` of an encoded image."""
    records: Any = OneImage(ONE_PIXEL)
    records.bytes = encoded
    return Decoder(records, format).read(np.arange(1))[0]


def random_pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_png_bytes_decode_to_their_pixels():
    pixels = random_pixels(6, 6, 3)
    np.testing.assert_array_equal(decoded(pixels, Format(6)), np.stack([pixels, pixels]))


def test_gray_images_have_one_channel_or_three_equal_ones():
    pixels = random_pixels(6, 6)
    gray, color = decoded(pixels, Format(6, "L")), decoded(pixels, Format(6, "RGB"))
    np.testing.assert_array_equal(gray[0, ..., 0], pixels)
    np.testing.assert_array_equal(color[0], np.repeat(pixels[..., None], 3, axis=-1))


def test_ink_becomes_255_and_nearest_keeps_the_image_binary():
    pixels = np.where(random_pixels(20, 20) < 99, 0, 255).astype(np.uint8)
    same = decoded(pixels, Format(20, "L", "nearest", ink=True))
    np.testing.assert_array_equal(same[0, ..., 0], 255 - pixels)
    small = decoded(pixels, Format(7, "L", "nearest", ink=True))
    assert small.shape == (2, 7, 7, 1)
    assert set(np.unique(small)) == {0, 255}


def test_dark_pixels_are_ink_and_not_only_black_ones():
    form = Format(3, "L", "nearest", ink=True)
    pixels = np.array([[0, 30, 127], [128, 200, 255], [255, 0, 255]], np.uint8)
    expected = np.where(pixels < 128, 255, 0)
    np.testing.assert_array_equal(decoded(pixels, form)[0, ..., 0], expected)


def test_a_drawing_has_the_same_ink_as_a_jpeg():
    drawing = np.full((40, 40), 255, np.uint8)
    drawing[4:36, 10:14] = drawing[18:22, 4:36] = 0
    jpeg = saved(Image.fromarray(drawing), "JPEG", quality=75)
    found = decoded_bytes(jpeg, Format(40, "L", "nearest", ink=True))[..., 0]
    np.testing.assert_array_equal(found, 255 - drawing)


def test_bilinear_averages_neighbors():
    pixels = np.zeros((2, 2), np.uint8)
    pixels[:, 1] = 200
    assert decoded(pixels, Format(1, "L")).ravel().tolist() == [100, 100]


def test_an_image_that_cannot_be_decoded_is_named(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n not an image")
    decoder = Decoder(FolderRecords(tmp_path), Format(6))
    with pytest.raises(files.ReadError, match=r"cat/2\.png: image cannot be decoded"):
        decoder.read(np.array([0]))
    with pytest.raises(ValueError, match=r"decoded: not an image that Pillow can read$"):
        decoder.read(np.array([0]))


# One row of two pixels for every mode that a file can have, and the gray levels that it gives: on
# white where it is transparent. The size of the format makes it two rows.
ALPHA = np.array([[0, 255]], np.uint8)
DEEP = np.array([[0, 3 * 257]], np.uint16)
"""A black pixel, and one of 16 bits that is 3 of 255."""


def merged(mode, *bands):
    return Image.merge(mode, [Image.fromarray(np.asarray(band, np.uint8)) for band in bands])


def palette(alpha=None):
    image = Image.frombytes("P", (2, 1), bytes([1, 0]))
    image.putpalette([10, 10, 10, 20, 20, 20])
    if alpha is not None:
        image.putalpha(Image.fromarray(alpha))
    return image


def twelve_bits():
    """Returns a TIFF whose samples have 12 bits, 0 and 4095, which Pillow does not write."""
    header = struct.pack("<2sHI", b"II", 42, 8)
    tags = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 110), (278, 1), (279, 3)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return header + struct.pack("<H", len(tags)) + entries + bytes(4) + b"\x00\x0f\xff"


def gray_png(num_bits, row, transparent):
    """A PNG of 2x2 pixels with equal rows; Pillow writes none with a transparent value."""
    chunk = lambda name, data: (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    )
    header = struct.pack(">IIBBBBB", 2, 2, num_bits, 0, 0, 0, 0)
    return b"".join([
        b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), chunk(b"tRNS", struct.pack(">H", transparent)),
        chunk(b"IDAT", zlib.compress((b"\0" + row) * 2)), chunk(b"IEND", b""),
    ])  # fmt: skip


GRAYS = [
    ("1", saved(Image.fromarray(np.array([[False, True]]))), [0, 255]),
    ("L", saved(Image.fromarray(np.array([[7, 90]], np.uint8))), [7, 90]),
    ("L transparent", saved(merged("L", [[7, 90]]), transparency=7), [255, 90]),
    ("LA", saved(merged("LA", [[0, 9]], ALPHA)), [255, 9]),
    ("LA half", saved(merged("LA", [[0, 0]], [[128, 255]])), [127, 0]),
    ("RGB", saved(merged("RGB", *[[[7, 90]]] * 3)), [7, 90]),
    ("RGB transparent", saved(merged("RGB", *[[[7, 90]]] * 3), transparency=(7, 7, 7)), [255, 90]),
    ("RGBA", saved(merged("RGBA", *[[[0, 9]]] * 3, ALPHA)), [255, 9]),
    ("P", saved(palette()), [20, 10]),
    ("P transparent", saved(palette(), transparency=1), [255, 10]),
    ("P bytes", saved(palette(), transparency=bytes([255, 0])), [255, 10]),
    ("P GIF", saved(palette(), "GIF", transparency=1), [255, 10]),
    ("RGBA WebP", saved(merged("RGBA", *[[[0, 9]]] * 3, ALPHA), "WEBP", lossless=True), [255, 9]),
    ("PA TIFF", saved(palette(ALPHA), "TIFF"), [255, 10]),
    ("CMYK TIFF", saved(merged("CMYK", *[ALPHA] * 3, [[0, 0]]), "TIFF"), [255, 0]),
    ("I;16", saved(Image.fromarray(DEEP)), [0, 3]),
    ("I;16 white", saved(Image.fromarray(DEEP * 0 + 65535)), [255, 255]),
    ("I;16 transparent", saved(Image.fromarray(DEEP), transparency=0), [255, 3]),
    ("I;16 TIFF", saved(Image.fromarray(DEEP), "TIFF"), [0, 3]),
    ("I;16B TIFF", saved(Image.fromarray(DEEP.astype(">u2")), "TIFF"), [0, 3]),
    ("12 bits TIFF", twelve_bits(), [0, 255]),
    ("4 bits transparent", gray_png(4, b"\x12", transparent=1), [255, 34]),
    ("2 bits transparent", gray_png(2, b"\x60", transparent=1), [255, 170]),
    ("I;16 TIFF, white is 0", saved(Image.fromarray(DEEP), "TIFF", tiffinfo={262: 0}), [255, 252]),
]


@pytest.mark.parametrize(
    ("encoded", "grays"), [row[1:] for row in GRAYS], ids=[r[0] for r in GRAYS]
)
@pytest.mark.parametrize("resample", ["nearest", "bilinear"])
def test_every_mode_has_one_rule(encoded, grays, resample):
    gray = decoded_bytes(encoded, Format(2, "L", resample))
    assert gray[..., 0].tolist() == [grays, grays]
    color = decoded_bytes(encoded, Format(2, "RGB", resample))
    np.testing.assert_array_equal(color, np.repeat(gray, 3, axis=-1))


def test_transparent_pixels_do_not_bleed_into_their_neighbors():
    pixels = merged("RGBA", *[[[0, 0]]] * 3, ALPHA)  # a black glyph on transparent black
    assert decoded_bytes(saved(pixels), Format(1)).ravel().tolist() == [128] * 3


def test_ink_of_a_transparent_drawing_is_its_opaque_part():
    drawing = saved(merged("LA", [[0, 0]], ALPHA))
    assert decoded_bytes(drawing, Format(2, "L", "nearest", ink=True))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(orientation, kind):
    upright = Image.fromarray(np.kron([[0, 80], [160, 240]], np.ones((8, 8))).astype(np.uint8))
    turns = Image.Transpose
    # What a camera stores for each orientation: the inverse of the turn that a viewer makes.
    stored = {
        2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE, 6: turns.ROTATE_90, 7: turns.TRANSVERSE, 8: turns.ROTATE_270,
    }  # fmt: skip
    image = upright.transpose(stored[orientation]) if orientation in stored else upright
    exif = Image.Exif()
    exif[274] = orientation
    found = decoded_bytes(saved(image, kind, exif=exif), Format(16, "L"))[..., 0]
    np.testing.assert_allclose(found, np.asarray(upright), atol=3)


def test_exif_that_cannot_be_read_counts_as_absent():
    encoded = saved(Image.new("L", (2, 2), 9), "JPEG", exif=b"Exif\0\0no orientation")
    assert (decoded_bytes(encoded, Format(2, "L")) == 9).all()


@pytest.mark.parametrize(
    ("image", "kind", "mode"),
    [(Image.new("F", (2, 2), 0.5), "TIFF", "F"), (Image.new("I", (2, 2), 300), "TIFF", "I")],
)
def test_a_mode_whose_range_is_not_known_is_refused(image, kind, mode):
    with pytest.raises(ValueError, match=f"image 0: .* the range of mode '{mode}' is not known"):
        decoded_bytes(saved(image, kind), Format(2))


def png_of_16_bit_color(*extra):
    def chunk(kind, data):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    pixels = np.full((2, 2, 3), 0x0903, ">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)), *extra]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks)


def test_16_bit_color_keeps_its_upper_bits_and_cannot_have_a_transparent_color():
    assert (decoded_bytes(png_of_16_bit_color(), Format(2)) == 9).all()
    transparent = (b"tRNS", struct.pack(">HHH", *[0x0903] * 3))
    with pytest.raises(ValueError, match="16-bit color with a transparent color; save it with"):
        decoded_bytes(png_of_16_bit_color(transparent), Format(2))


def test_the_first_frame_of_an_animation_is_read():
    frames = [Image.new("L", (2, 2), gray) for gray in (40, 200)]
    encoded = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decoded_bytes(encoded, Format(2, "L")) == 40).all()
