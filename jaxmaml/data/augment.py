"""What is done to the pixels of a task inside jit, on the device, whatever the source."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxmaml.types import Array

CIFAR_MEAN, CIFAR_STD = (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)
"""Of CIFAR-100's training images, in 0..1."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's training images, in 0..1."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """Random changes of each image, and the scaling that always follows them.

    Attributes:
        crop: pixels by which the image is moved at most, each way; what comes in is black.
        flip: mirror left and right, half of the images.
        jitter: brightness, contrast and saturation are each multiplied by a factor uniform in
            [1 - jitter, 1 + jitter].
        mean, std: per channel, in 0..1; the result is (pixel / 255 - mean) / std.

    >>> Augment(crop=4, flip=True).crop
    4
    """

    crop: int = 0
    flip: bool = False
    jitter: float = 0.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


NONE = Augment()
"""Pixels in 0..1, as they are."""


def apply(settings: Augment, images: Array, key: Array) -> Array:
    """uint8 `[..., H, W, C]` as float32, each image changed on its own.

    Args:
        settings: what to do.
        images: uint8 `[..., H, W, C]`.
        key: of the task; not used where nothing is random.
    """
    flat = images.reshape(-1, *images.shape[-3:]).astype(jnp.float32) / 255
    if settings.crop or settings.flip or settings.jitter:
        # Another stream of numbers than the plan's, which splits the same key.
        keys = jax.random.split(jax.random.fold_in(key, 1), len(flat))
        flat = jax.vmap(lambda image, key: _change(settings, image, key))(flat, keys)
    if settings.mean != (0.0,) or settings.std != (1.0,):
        flat = (flat - _row(settings.mean)) / _row(settings.std)
    return flat.reshape(images.shape)


def check(settings: Augment, image_shape: tuple[int, ...]) -> None:
    """Raises ValueError for settings that do not suit images of this shape."""
    height, width, channels = image_shape
    if not 0 <= settings.crop < min(height, width):
        raise ValueError(
            f"crop must be from 0 to below the image's smaller side {min(height, width)}, "
            f"got {settings.crop}"
        )
    if not 0 <= settings.jitter <= 1:
        raise ValueError(f"jitter must be from 0 to 1, got {settings.jitter}")
    for name, values in (("mean", settings.mean), ("std", settings.std)):
        if len(values) not in (1, channels) or not all(map(math.isfinite, values)):
            raise ValueError(f"{name} must be 1 or {channels} numbers, got {values}")
    if min(settings.std) <= 0:
        raise ValueError(f"std must be positive, got {settings.std}")


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


def _row(values: tuple[float, ...]) -> Array:
    return jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1)
