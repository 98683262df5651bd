"""Decoders: pixels, sizes and modes, and damaged images."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxmaml import files
from jaxmaml.data.decoders import Decoder, Format
from jaxmaml.data.records import FolderRecords


class OneImage:
    """Records of the same image."""

    def __init__(self, pixels: np.ndarray):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        self.bytes = file.getvalue()

    def encoded(self, numbers):
        return [self.bytes for _ in numbers]


def decoded(pixels, format):
    records: Any = OneImage(pixels)
    return Decoder(records, format).read(np.arange(2))


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
