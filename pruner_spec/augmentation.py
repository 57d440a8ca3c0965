"""Training's image augmentation: what is drawn, and what becomes of an image.

Each sample's parameters are functions of its own random key. A camera that does not sit on a wrist
is cropped to 95 %, at a random place, resized back and turned by up to 5 degrees, in one bilinear
sampling; every camera's brightness, contrast and saturation change.

Source: openpi, `models_pytorch/preprocessing_pytorch.py` and `models/model.py`, which differ from
each other in their sampling; this is one definition for both backends.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float

from pruner_spec.images import PAD_VALUE

CROP = 0.95  # of the height and of the width
MAX_DEGREES = 5.0
BRIGHTNESS, CONTRAST, SATURATION = 0.3, 0.4, 0.5
DRAWS = 6  # uniform numbers a camera: see `parameters`


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What happens to the images of one camera.

    Attributes:
        matrix: [B, 2, 3]: from (row, column, 1) of the new image to (row, column) in the old.
        brightness: [B], the factor of every value, of images in [0, 1].
        contrast: [B], the factor of the distance to the image's mean.
        saturation: [B], the factor of the distance to the pixel's mean over its colours.
    """

    matrix: Float[np.ndarray, "B 2 3"]
    brightness: Float[np.ndarray, "B"]
    contrast: Float[np.ndarray, "B"]
    saturation: Float[np.ndarray, "B"]


def moves(camera: str) -> bool:
    """Whether a camera's images are cropped and turned: those on a wrist are not."""
    return "wrist" not in camera


def parameters(uniform: Float[np.ndarray, "B draws"], camera: str, size: int) -> Augmentation:
    """The augmentation of a camera from numbers in [0, 1).

    Args:
        uniform: [B, `DRAWS`]: the crop's row and column, the angle, brightness, contrast,
            saturation.
        camera: its name.
        size: of the square images, in pixels.
    """
    one = uniform.dtype.type
    row, column, turn, *colour = np.moveaxis(uniform, -1, 0)
    factors = [
        one(1) + one(spread) * (one(2) * value - one(1))
        for spread, value in zip((BRIGHTNESS, CONTRAST, SATURATION), colour, strict=True)
    ]
    matrix = np.broadcast_to(np.eye(2, 3, dtype=uniform.dtype), (len(uniform), 2, 3))
    if moves(camera):
        matrix = _affine(row, column, one(MAX_DEGREES * math.pi / 180) * (2 * turn - 1), size)
    return Augmentation(matrix, *factors)


def _affine(
    row: Float[np.ndarray, "B"],
    column: Float[np.ndarray, "B"],
    angle: Float[np.ndarray, "B"],
    size: int,
) -> Float[np.ndarray, "B 2 3"]:
    """Turned about the image's centre, then shrunk into the crop."""
    crop = int(size * CROP)
    scale, centre = crop / size, (size - 1) / 2
    cos, sin = np.cos(angle) * row.dtype.type(scale), np.sin(angle) * row.dtype.type(scale)
    middle = [offset * (size - crop) + (crop - 1) / 2 for offset in (row, column)]
    rows = np.stack([cos, -sin, middle[0] - (cos - sin) * centre], axis=-1)
    columns = np.stack([sin, cos, middle[1] - (sin + cos) * centre], axis=-1)
    return np.stack([rows, columns], axis=1).astype(row.dtype)


def augment(
    images: Float[np.ndarray, "B H W 3"], augmentation: Augmentation
) -> Float[np.ndarray, "B H W 3"]:
    """The reference: images in [-1, 1], augmented."""
    moved = np.stack(
        [_sample(image, m) for image, m in zip(images, augmentation.matrix, strict=True)]
    )
    x = moved * 0.5 + 0.5
    x = x * augmentation.brightness[:, None, None, None]
    mean = x.mean(axis=(1, 2, 3), keepdims=True)
    x = (x - mean) * augmentation.contrast[:, None, None, None] + mean
    grey = x.mean(axis=-1, keepdims=True)
    x = (x - grey) * augmentation.saturation[:, None, None, None] + grey
    return np.clip(x, 0, 1) * 2 - 1


def _sample(
    image: Float[np.ndarray, "H W 3"], matrix: Float[np.ndarray, "2 3"]
) -> Float[np.ndarray, "H W 3"]:
    """Bilinear; what lies outside of the image is black."""
    height, width, _ = image.shape
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1)
    places = grid.astype(image.dtype) @ matrix[:, :2].T + matrix[:, 2]
    corner = np.floor(places)
    share = places - corner
    result = np.zeros_like(image)
    for down in (0, 1):
        for right in (0, 1):
            weights = np.abs(1 - down - share[..., 0]) * np.abs(1 - right - share[..., 1])
            rows, columns = (corner.astype(int) + np.array([down, right])).transpose(2, 0, 1)
            inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
            values = image[np.clip(rows, 0, height - 1), np.clip(columns, 0, width - 1)]
            result += weights[..., None] * np.where(inside[..., None], values, PAD_VALUE)
    return result
