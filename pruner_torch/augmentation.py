"""Training's image augmentation, a batch at once; `pruner_spec.augmentation` is its definition.

Dimension letters: B batch, H and W pixels.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from pruner_spec import augmentation as spec
from pruner_spec.images import PAD_VALUE


def augment(
    images: Float[Tensor, "B H W 3"], uniform: Float[Tensor, "B draws"], camera: str
) -> Float[Tensor, "B H W 3"]:
    """One camera's images, augmented each in its own way.

    Args:
        images: square, in [-1, 1].
        uniform: numbers in [0, 1): see `pruner_spec.augmentation.parameters`.
        camera: its name, which says whether its images are cropped and turned.
    """
    row, column, turn, *colour = uniform.unbind(dim=-1)
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
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = (x - mean) * contrast + mean
    grey = x.mean(dim=-1, keepdim=True)
    x = (x - grey) * saturation + grey
    return x.clamp(0, 1) * 2 - 1


def _shifts(
    row: Float[Tensor, "B"], column: Float[Tensor, "B"], angle: Float[Tensor, "B"], size: int
) -> tuple[Float[Tensor, "B H W"], Float[Tensor, "B H W"]]:
    """How far below and beside each pixel of the new image its place in the old one is.

    Not the places themselves: these are smaller numbers, of which float32 has more digits.
    """
    crop = int(size * spec.CROP)
    scale = crop / size
    less, turned, below, beside = (
        x[:, None, None]
        for x in (
            scale - 1 - 2 * scale * (angle / 2).sin().square(),  # scale * cos(angle) - 1
            scale * angle.sin(),
            (row - 0.5) * (size - crop),
            (column - 0.5) * (size - crop),
        )
    )
    along = torch.arange(size, dtype=angle.dtype, device=angle.device) - (size - 1) / 2
    down, right = along[:, None], along[None, :]
    return below + less * down - turned * right, beside + turned * down + less * right


def _sample(
    images: Float[Tensor, "B H W 3"], below: Float[Tensor, "B H W"], beside: Float[Tensor, "B H W"]
) -> Float[Tensor, "B H W 3"]:
    """Bilinear; what lies outside of the image is black."""
    batch, height, width, _ = images.shape
    sample, row, column = (
        torch.arange(length, device=images.device) for length in (batch, height, width)
    )
    first_row, first_column = row[:, None] + below.floor().long(), column + beside.floor().long()
    share_below, share_beside = below - below.floor(), beside - beside.floor()
    total = torch.zeros_like(images)
    for down in (0, 1):
        for right in (0, 1):
            row, column = first_row + down, first_column + right
            weight = (1 - down - share_below).abs() * (1 - right - share_beside).abs()
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            place = (sample[:, None, None], row.clamp(0, height - 1), column.clamp(0, width - 1))
            values = images[place]
            total += weight[..., None] * torch.where(inside[..., None], values, PAD_VALUE)
    return total
