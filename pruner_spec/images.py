"""Resizing with the aspect kept and the rest padded, as openpi's models see images.

The filter is separable, so that a resize is two matrix products; the matrices hold the padding's
place too. They are built here once; any backend multiplies.
"""

import numpy as np
from jaxtyping import Float

PAD_VALUE = -1.0  # black, of images in [-1, 1]


def resize_geometry(size: tuple[int, int], target: tuple[int, int]) -> tuple[slice, slice]:
    """Where in the target the resized picture lies, (rows, columns), centred.

    Args:
        size: (height, width) of the image.
        target: (height, width) to fit it in.

    Raises:
        ValueError: a length is not positive.
    """
    for name, length in zip(("height", "width") * 2, (*size, *target), strict=True):
        if length < 1:
            raise ValueError(f"{name}: expected at least one pixel, got {length}")
    ratio = max(size[0] / target[0], size[1] / target[1])
    spans = []
    for length, room in zip(size, target, strict=True):
        resized = max(1, int(length / ratio))
        start = (room - resized) // 2
        spans.append(slice(start, start + resized))
    return spans[0], spans[1]


def resize_matrix(length: int, resized: int) -> Float[np.ndarray, "resized length"]:
    """Weights of a linear resize along one axis, antialiased when it shrinks.

    A triangle as wide as an output pixel (an input pixel where the image grows), its weights
    normalised to 1 at the borders: `jax.image.resize` with method "linear".
    """
    scale = length / resized
    support = max(scale, 1.0)
    centre = (np.arange(resized) + 0.5) * scale - 0.5
    distance = np.abs(centre[:, None] - np.arange(length)[None, :]) / support
    weights = np.maximum(0.0, 1.0 - distance)
    return weights / weights.sum(axis=1, keepdims=True)


def resize_with_pad(
    images: Float[np.ndarray, "B height width channels"], height: int, width: int
) -> Float[np.ndarray, "B {height} {width} channels"]:
    """Images in [-1, 1] resized to fit [height, width], with black around them."""
    rows, columns = resize_geometry(images.shape[1:3], (height, width))
    down = resize_matrix(images.shape[1], rows.stop - rows.start).astype(images.dtype)
    across = resize_matrix(images.shape[2], columns.stop - columns.start).astype(images.dtype)
    batch, channels = images.shape[0], images.shape[3]
    padded = np.full((batch, height, width, channels), PAD_VALUE, dtype=images.dtype)
    padded[:, rows, columns] = np.einsum(
        "rh,bhwc,sw->brsc", down, images, across, optimize=True
    ).clip(-1.0, 1.0)
    return padded
