"""The statistics that LeRobot datasets carry: of each episode, and of the whole.

Images are summed up as histograms, which add up: the statistics of any number of episodes come out
exact without seeing an image twice.
"""

import numpy as np
from jaxtyping import Int64, UInt8

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


def column_stats(values: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of a column's numbers, [frames, *shape]: each [*shape], or [1] for scalars."""
    numbers = np.asarray(values, np.float64)
    numbers = numbers[:, None] if numbers.ndim == 1 else numbers
    quantiles = np.quantile(numbers, list(QUANTILES.values()), axis=0)
    return {
        "min": numbers.min(axis=0),
        "max": numbers.max(axis=0),
        "mean": numbers.mean(axis=0),
        "std": numbers.std(axis=0),
        "count": np.array([len(numbers)]),
        **dict(zip(QUANTILES, quantiles, strict=True)),
    }


def image_histogram(images: UInt8[np.ndarray, "T H W 3"]) -> Int64[np.ndarray, "3 256"]:
    """How often each value occurs in each colour channel."""
    return np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(3)])


def image_stats(histogram: Int64[np.ndarray, "3 256"], frames: int) -> dict[str, np.ndarray]:
    """Statistics of the pixels, scaled to [0, 1]: each [3, 1, 1], a number a channel."""
    levels = np.arange(256) / 255.0
    share = histogram / histogram.sum(axis=1, keepdims=True)
    below = np.cumsum(share, axis=1)
    mean = share @ levels
    stats = {
        "min": levels[(histogram > 0).argmax(axis=1)],
        "max": levels[255 - (histogram[:, ::-1] > 0).argmax(axis=1)],
        "mean": mean,
        "std": np.sqrt((share * (levels - mean[:, None]) ** 2).sum(axis=1)),
        **{name: levels[(below >= q).argmax(axis=1)] for name, q in QUANTILES.items()},
    }
    stats = {name: value.reshape(3, 1, 1) for name, value in stats.items()}
    return stats | {"count": np.array([frames])}
