"""Images of robots and datasets as the model's data has them: uint8, 224x224.

Resized with Pillow, as openpi does for data: the released checkpoints saw these very pixels,
rounded to 8 bits after each axis. `pruner_spec.images` resizes floats, as openpi's models do.
"""

import threading
from collections.abc import Callable, Hashable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from pruner_spec.config import IMAGE_SIZE
from pruner_spec.images import resize_geometry


def parse_image(image: np.ndarray, name: str) -> UInt8[np.ndarray, "height width 3"]:
    """An image with its colours last and 8 bits, whichever of openpi's forms it has.

    Args:
        image: [height, width, 3] or [3, height, width]; uint8, or floats in [0, 1].
        name: for errors.

    Raises:
        ValueError: it is none.
    """
    image = np.asarray(image)
    if np.issubdtype(image.dtype, np.floating):
        image = (255 * image.clip(0.0, 1.0)).astype(np.uint8)
    if image.ndim == 3 and image.shape[2] != 3 and image.shape[0] == 3:
        image = image.transpose(1, 2, 0)
    if image.ndim != 3 or image.shape[2] != 3 or not image.size or image.dtype != np.uint8:
        expected = "[H, W, 3] or [3, H, W] of uint8, or of floats in [0, 1]"
        raise ValueError(f"{name}: expected {expected}, got {list(image.shape)} of {image.dtype}")
    return image


def resize_with_pad(
    image: UInt8[np.ndarray, "height width 3"], size: int = IMAGE_SIZE
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The image resized to fit a square, with black around it; itself where it has that size."""
    if image.shape[:2] == (size, size):
        return image
    rows, columns = resize_geometry((image.shape[0], image.shape[1]), (size, size))
    picture = Image.fromarray(np.ascontiguousarray(image)).resize(
        (columns.stop - columns.start, rows.stop - rows.start), Image.Resampling.BILINEAR
    )
    padded = np.zeros((size, size, 3), np.uint8)
    padded[rows, columns] = np.asarray(picture)
    return padded


class ImageCache:
    """Images that were made once, up to a number of bytes; the first ones stay.

    Every epoch asks for every image once: what was used last is then the last that is needed, and
    replacing images would gain nothing.
    """

    def __init__(self, limit: int):
        self._images: dict[Hashable, np.ndarray] = {}
        self._left = limit
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The image of a key, made if it is not here. Not to be written to."""
        image = self._images.get(key)
        if image is None:
            image = make()
            with self._lock:
                if key not in self._images and self._left >= image.nbytes:
                    self._left -= image.nbytes
                    self._images[key] = image
        return image
