"""Random changes and scaling of a task's pixels, inside `jit` and for every source of images."""

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp

from jaxmaml.checks import check_count
from jaxmaml.types import Array

CIFAR_MEAN, CIFAR_STD = (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)
"""Mean and standard deviation per channel of the training images of CIFAR-100, in 0..1."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation per channel of the training images of ImageNet, in 0..1."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """Settings: random changes of each image, and the scaling that always follows them.

    Attributes:
        crop: the largest number of pixels that an image moves by in each direction. The border
            that becomes visible is black.
        flip: whether each image is mirrored left to right with probability one half.
        jitter: brightness, contrast and saturation are each multiplied by a factor that is uniform
            in [1 - jitter, 1 + jitter].
        mean, std: per channel, in 0..1. The result is (pixel / 255 - mean) / std.

    Example:
        >>> Augment(crop=4, flip=True).crop
        4
    """

    crop: int = 0
    flip: bool = False
    jitter: float = 0.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


NONE = Augment()
"""No change: pixels in 0..1."""


def apply(settings: Augment, images: Array, key: Array) -> Array:
    """Returns the images as float32, each changed independently and then scaled.

    Args:
        settings: the changes and the scaling.
        images: uint8 `[..., H, W, C]`.
        key: a PRNG key that nothing else uses: `episodes.TaskKeys` has one. It is not used if
            nothing is random.

    Returns:
        float32 `[..., H, W, C]`.

    Example:
        >>> images = jnp.full((2, 8, 8, 3), 255, jnp.uint8)
        >>> settings = Augment(mean=(0.5,), std=(0.5,))
        >>> float(apply(settings, images, jax.random.key(0)).max())
        1.0
    """
    flat = images.reshape(-1, *images.shape[-3:]).astype(jnp.float32) / 255
    if settings.crop or settings.flip or settings.jitter:
        keys = jax.random.split(key, len(flat))
        flat = jax.vmap(lambda image, key: _change(settings, image, key))(flat, keys)
    if settings.mean != (0.0,) or settings.std != (1.0,):
        flat = (flat - _per_channel(settings.mean)) / _per_channel(settings.std)
    return flat.reshape(images.shape)


def check(settings: Augment, image_shape: tuple[int, ...]) -> None:
    """Checks that the settings suit images of a shape.

    Args:
        settings: the changes and the scaling.
        image_shape: (height, width, channels).

    Raises:
        TypeError: `crop` is not an integer, `flip` is not a bool, `jitter` is not a number, or
            `mean` or `std` is not a tuple of numbers.
        ValueError: a setting is out of range, or has the wrong number of channels.

    Example:
        >>> check(Augment(crop=8), (8, 8, 3))
        Traceback (most recent call last):
        ValueError: crop must be from 0 to 7, less than the image's shorter side; got 8
    """
    height, width, channels = image_shape
    _check_types(settings)
    shorter = min(height, width)
    if settings.crop >= shorter:
        raise ValueError(
            f"crop must be from 0 to {shorter - 1}, less than the image's shorter side; "
            f"got {settings.crop}"
        )
    if not 0 <= settings.jitter <= 1:
        raise ValueError(f"jitter must be from 0 to 1; got {settings.jitter}")
    for name, values in (("mean", settings.mean), ("std", settings.std)):
        if len(values) not in (1, channels) or not all(map(math.isfinite, values)):
            raise ValueError(f"{name} must be 1 or {channels} finite numbers; got {values}")
    if min(settings.std) <= 0:
        raise ValueError(f"std must be positive; got {settings.std}")


def _check_types(settings: Augment) -> None:
    check_count("crop", settings.crop, minimum=0)
    if not isinstance(settings.flip, bool):
        raise TypeError(f"flip must be a bool; got {settings.flip!r}")
    if not isinstance(settings.jitter, numbers.Real):
        raise TypeError(f"jitter must be a number; got {settings.jitter!r}")
    for name, values in (("mean", settings.mean), ("std", settings.std)):
        if not isinstance(values, tuple) or not all(isinstance(v, numbers.Real) for v in values):
            raise TypeError(f"{name} must be a tuple of numbers; got {values!r}")


def _change(settings: Augment, image: Array, key: Array) -> Array:
    crop_key, flip_key, jitter_key = jax.random.split(key, 3)
    if settings.crop:
        image = _shift(image, settings.crop, crop_key)
    if settings.flip:
        image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
    return _jitter(image, settings.jitter, jitter_key) if settings.jitter else image


def _shift(image: Array, most: int, key: Array) -> Array:
    padded = jnp.pad(image, ((most, most), (most, most), (0, 0)))
    row, column = jax.random.randint(key, (2,), 0, 2 * most + 1)
    return jax.lax.dynamic_slice(padded, (row, column, 0), image.shape)


def _jitter(image: Array, strength: float, key: Array) -> Array:
    brightness, contrast, saturation = jax.random.uniform(
        key, (3,), minval=1 - strength, maxval=1 + strength
    )
    image = jnp.clip(image * brightness, 0, 1)
    image = _blend(image, jnp.mean(image, keepdims=True), contrast)
    return _blend(image, jnp.mean(image, axis=-1, keepdims=True), saturation)


def _blend(image: Array, other: Array, weight: Array) -> Array:
    return jnp.clip(other + weight * (image - other), 0, 1)


def _per_channel(values: tuple[float, ...]) -> Array:
    return jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1)
