"""The picture of a support and of predictions: what it shows, and what it leaves out."""

import io

import numpy as np
import pytest
from PIL import Image

from jaxmaml.experiments import gallery


def _texts(figure):
    return [text.get_text() for text in figure.texts]


def _drawn(classes, num_images, channels=3):
    targets = np.repeat(np.arange(len(classes)), 2)
    support = np.zeros((len(targets), 4, 4, channels), np.uint8)
    images = np.zeros((num_images, 4, 4, channels), np.uint8)
    probabilities = np.tile(np.linspace(0.1, 0.9, len(classes)), (num_images, 1))
    names = [f"{i}.png" for i in range(num_images)]
    return gallery.draw(support, targets, classes, names, images, probabilities, title="a title")


def test_every_class_and_prediction_is_named():
    figure = _drawn(["cat", "dog", "emu"], 3)
    assert _texts(figure) == [
        "a title", "support", "cat", "dog", "emu", "predictions",
        *[f"{i}.png\nemu\n90 %" for i in range(3)],
    ]  # fmt: skip
    assert len(figure.axes) == 6 + 3


def test_what_is_left_out_is_said():
    names = [f"class {i}" for i in range(25)]
    texts = _texts(_drawn(names, 70))
    assert "support: the first 20 of 25 classes" in texts
    assert "predictions: the first 60 of 70 pictures" in texts


@pytest.mark.parametrize("channels", [1, 3])
def test_any_name_can_be_drawn(channels):
    names = ["$x_1$ and $", "猫", "a name that is much longer than the picture is wide"]
    png = gallery.png(_drawn(names, 1, channels))
    assert Image.open(io.BytesIO(png)).size[0] > 100
