"""Training's image augmentation, a batch at once; `pruner_spec.augmentation` is its definition.

Dimension letters: B batch, H and W pixels.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pruner_spec import augmentation as spec
from pruner_spec.images import PAD_VALUE


def augment(
    images: Float[Array, "B H W 3"], uniform: Float[Array, "B draws"], camera: str
) -> Float[Array, "B H W 3"]:
    """One camera's images, augmented each in its own way.

    Args:
        images: square, in [-1, 1].
        uniform: numbers in [0, 1): see `pruner_spec.augmentation.parameters`.
        camera: its name, which says whether its images are cropped and turned.
    """
    row, column, turn, *colour = jnp.moveaxis(uniform, -1, 0)
    if spec.moves(camera):
        angle = math.radians(spec.MAX_DEGREES) * (2 * turn - 1)
        images = _sample(images, *_shifts(row, column, angle, images.shape[1]))
    brightness, contrast, saturation = (
        (1 + spread * (2 * value - 1))[:, None, None, None]
        for spread, value in zip(
            (spec.BRIGHTNESS, spec.CONTRAST, spec.SATURATION), colour, strict=True
        )
    )
    x = (images * 0.5 + 0.5) * brightness
    mean = x.mean(axis=(1, 2, 3), keepdims=True)
    x = (x - mean) * contrast + mean
    grey = x.mean(axis=-1, keepdims=True)
    x = (x - grey) * saturation + grey
    return x.clip(0, 1) * 2 - 1


def _shifts(
    row: Float[Array, "B"], column: Float[Array, "B"], angle: Float[Array, "B"], size: int
) -> tuple[Float[Array, "B H W"], Float[Array, "B H W"]]:
    """How far below and beside each pixel of the new image its place in the old one is.

    Not the places themselves: these are smaller numbers, of which float32 has more digits.
    """
    crop = int(size * spec.CROP)
    scale = crop / size
    less, turned, below, beside = (
        x[:, None, None]
        for x in (
            scale - 1 - 2 * scale * jnp.square(jnp.sin(angle / 2)),  # scale * cos(angle) - 1
            scale * jnp.sin(angle),
            (row - 0.5) * (size - crop),
            (column - 0.5) * (size - crop),
        )
    )
    along = jnp.arange(size, dtype=angle.dtype) - (size - 1) / 2
    down, right = along[:, None], along[None, :]
    return below + less * down - turned * right, beside + turned * down + less * right


def _sample(
    images: Float[Array, "B H W 3"], below: Float[Array, "B H W"], beside: Float[Array, "B H W"]
) -> Float[Array, "B H W 3"]:
    """Bilinear; what lies outside of the image is black."""
    height, width = images.shape[1:3]
    first_row = jnp.arange(height)[:, None] + jnp.floor(below).astype(jnp.int32)
    first_column = jnp.arange(width) + jnp.floor(beside).astype(jnp.int32)
    share_below, share_beside = below - jnp.floor(below), beside - jnp.floor(beside)
    total = jnp.zeros_like(images)
    for down in (0, 1):
        for right in (0, 1):
            row, column = first_row + down, first_column + right
            weight = jnp.abs(1 - down - share_below) * jnp.abs(1 - right - share_beside)
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            place = (row.clip(0, height - 1), column.clip(0, width - 1))
            values = jax.vmap(lambda image, *at: image[at])(images, *place)
            total += weight[..., None] * jnp.where(inside[..., None], values, PAD_VALUE)
    return total
