"""Changes of pixels: random per image, the same for the same key, and none by default."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmaml.data import augmentation
from jaxmaml.data.augmentation import Augment

IMAGES = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), np.uint8)


def changed(key=0, images=IMAGES, **settings):
    apply = jax.jit(lambda images, key: augmentation.apply(Augment(**settings), images, key))
    return np.asarray(apply(images, jax.random.key(key)))


def test_only_the_scale_changes_by_default():
    np.testing.assert_allclose(changed(), IMAGES / 255, rtol=1e-6)
    scaled = changed(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    expected = (IMAGES / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.25, 2.0]
    np.testing.assert_allclose(scaled, expected, atol=1e-6)


def test_half_of_the_images_are_mirrored():
    found, plain = changed(flip=True), changed()
    is_same = (found == plain).all((1, 2, 3))
    is_mirrored = (found == plain[:, :, ::-1]).all((1, 2, 3))
    assert (is_same ^ is_mirrored).all()
    assert 20 < is_mirrored.sum() < 44


def test_a_crop_moves_each_image_and_fills_with_black():
    padded = np.pad(changed(), ((0, 0), (2, 2), (2, 2), (0, 0)))
    windows = {(i, j): padded[:, i : i + 8, j : j + 8] for i in range(5) for j in range(5)}
    found = changed(crop=2)
    moved = [
        next(at for at, window in windows.items() if (window[n] == found[n]).all())
        for n in range(len(found))
    ]
    assert len(set(moved)) > 15
    assert {i for i, _ in moved} == {j for _, j in moved} == set(range(5))


def test_jitter_changes_colors_within_bounds():
    found, plain = changed(jitter=0.4), changed()
    assert found.min() >= 0
    assert found.max() <= 1
    ratio = found.mean((1, 2, 3)) / plain.mean((1, 2, 3))
    assert ratio.std() > 0.1
    assert 0.55 < ratio.min() < ratio.max() < 1.45


def test_gray_images_keep_one_channel():
    gray = IMAGES[..., :1]
    found = changed(images=gray, crop=1, flip=True, jitter=0.2)
    assert found.shape == gray.shape


def test_the_same_key_gives_the_same_changes_and_another_key_others():
    settings = {"crop": 2, "flip": True, "jitter": 0.3}
    np.testing.assert_array_equal(changed(1, **settings), changed(1, **settings))
    assert (changed(1, **settings) != changed(2, **settings)).any()
    assert changed(1, **settings).dtype == jnp.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": 8}, "crop must be from 0 to 7, less than the image's shorter side; got 8"),
        ({"crop": -1}, "crop must be"),
        ({"jitter": 1.5}, "jitter must be from 0 to 1"),
        ({"mean": (0.0, 1.0)}, "mean must be 1 or 3 finite numbers"),
        ({"std": (float("nan"),)}, "std must be 1 or 3 finite numbers"),
        ({"jitter": float("nan")}, "jitter must be from 0 to 1; got nan"),
        ({"std": (0.0,)}, "std must be positive"),
    ],
)
def test_check_refuses_settings_that_do_not_suit_the_images(settings, message):
    with pytest.raises(ValueError, match=message):
        augmentation.check(Augment(**settings), (8, 8, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": 1.5}, "crop must be an integer, 0 or more; got 1.5"),
        ({"flip": "no"}, "flip must be a bool; got 'no'"),
        ({"jitter": "0.1"}, "jitter must be a number; got '0.1'"),
        ({"mean": 0.5}, "mean must be a tuple of numbers; got 0.5"),
        ({"std": [1.0]}, r"std must be a tuple of numbers; got \[1.0\]"),
    ],
)
def test_check_refuses_settings_of_another_type(settings, message):
    with pytest.raises(TypeError, match=message):
        augmentation.check(Augment(**settings), (8, 8, 3))
