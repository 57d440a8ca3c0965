"""Statistics of a dataset's state and actions, as the model knows them before normalisation.

Two passes over blocks of frames, in memory that does not grow with the dataset. The first sums up
moments, in float64, and counts the upper 16 bits of the numbers as float32; the second counts the
lower 16 bits where the quantiles are. So these are exact, but for numbers being float32, where
openpi's are those of a histogram whose bins move.
"""

import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Float, UInt32

from convert.assets import FILE
from pruner_run.data.config import DataConfig
from pruner_run.data.normalization import FeatureStats, NormStats
from pruner_run.data.samples import RobotSamples
from pruner_run.data.sampling import epoch_order
from pruner_run.data.transforms import apply, number_transforms

BLOCK = 1024  # frames
QUANTILES = {"q01": 0.01, "q99": 0.99}

_HALF, _BINS = 16, 1 << 16
_SIGN = np.uint32(1 << 31)

Blocks = Callable[[], Iterable[Float[np.ndarray, "n A"]]]


class HasData(Protocol):
    """What is read of a training config."""

    @property
    def name(self) -> str: ...

    @property
    def data(self) -> DataConfig: ...

    @property
    def assets_dirs(self) -> Path: ...


class Moments:
    """Count, mean and sum of squared deviations; those of two parts give those of the whole.

    Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances" (1979).
    """

    def __init__(self, values: Float[np.ndarray, "n A"]):
        self.count = len(values)
        self.mean = values.mean(axis=0, dtype=np.float64)
        self.squares = ((values - self.mean) ** 2).sum(axis=0)

    def merge(self, other: "Moments") -> None:
        """Adds another part's."""
        count = self.count + other.count
        difference = other.mean - self.mean
        self.mean = self.mean + difference * (other.count / count)
        between = difference**2 * (self.count * other.count / count)
        self.squares = self.squares + other.squares + between
        self.count = count

    @property
    def std(self) -> Float[np.ndarray, "A"]:
        """The standard deviation, of the whole population."""
        return np.sqrt(self.squares / self.count)


def feature_stats(blocks: Blocks) -> FeatureStats:
    """Statistics of the rows of all blocks.

    Args:
        blocks: gives the same blocks twice.

    Raises:
        ValueError: there are fewer than two rows, or a number is not finite.
    """
    moments, upper = _first_pass(blocks)
    if moments is None or moments.count < 2:
        found = 0 if moments is None else moments.count
        raise ValueError(f"statistics: expected at least 2 rows, got {found}")
    quantiles = _quantiles(blocks, upper, moments.count)
    return FeatureStats(mean=moments.mean, std=moments.std, **quantiles)


def _first_pass(blocks: Blocks) -> tuple[Moments | None, np.ndarray]:
    """Moments, and how often the upper half of each number's bits occurs, [A, 65536]."""
    moments, upper = None, np.zeros((0, _BINS), np.int64)
    for block in blocks():
        if not np.isfinite(block).all():
            raise ValueError("statistics: expected finite numbers, got others")
        counts = [np.bincount(column >> _HALF, minlength=_BINS) for column in _ordered(block).T]
        if moments is None:
            moments, upper = Moments(block), np.stack(counts)
        else:
            moments.merge(Moments(block))
            upper += counts
    return moments, upper


def _quantiles(blocks: Blocks, upper: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Quantiles between two neighbours in order of size, as `numpy.quantile` by default."""
    places = {name: share * (count - 1) for name, share in QUANTILES.items()}
    ranks = sorted({f(place) for place in places.values() for f in (math.floor, math.ceil)})
    below = np.cumsum(upper, axis=1)
    found = np.stack([np.searchsorted(row, ranks, side="right") for row in below])  # [A, ranks]
    lower = {
        (number, half): np.zeros(_BINS, np.int64)
        for number, halves in enumerate(found)
        for half in halves
    }
    for block in blocks():
        keys = _ordered(block)
        for (number, half), counts in lower.items():
            column = keys[:, number]
            chosen = column[column >> _HALF == half] & (_BINS - 1)
            counts += np.bincount(chosen, minlength=_BINS)
    at_rank = {}
    for place, rank in enumerate(ranks):
        keys = np.zeros(len(found), np.uint32)
        for number, half in enumerate(found[:, place]):
            before = below[number, half] - upper[number, half]
            rest = np.searchsorted(np.cumsum(lower[number, half]), rank - before, side="right")
            keys[number] = (int(half) << _HALF) + rest
        at_rank[rank] = _unordered(keys).astype(np.float64)
    quantiles = {}
    for name, place in places.items():
        low, high = at_rank[math.floor(place)], at_rank[math.ceil(place)]
        quantiles[name] = low + (high - low) * (place - math.floor(place))
    return quantiles


def _ordered(values: np.ndarray) -> UInt32[np.ndarray, "n A"]:
    """Float32 numbers as integers of the same order."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def _unordered(keys: UInt32[np.ndarray, "A"]) -> np.ndarray:
    """The inverse of `_ordered`."""
    return np.where(keys & _SIGN, keys ^ _SIGN, ~keys).astype(np.uint32).view(np.float32)


def dataset_norm_stats(
    data: DataConfig, horizon: int, *, max_frames: int | None = None
) -> NormStats:
    """Statistics of a dataset, with every chunk of actions, as they are trained on.

    Args:
        data: the dataset and its transforms.
        horizon: H, actions in a chunk.
        max_frames: of that many frames only, drawn without order; None for all.

    Raises:
        FileNotFoundError: there is no such dataset, or one of its files is missing.
        ValueError: the dataset is damaged or does not fit.
    """
    samples = RobotSamples(data, horizon)
    frames = np.arange(len(samples))
    if max_frames is not None and max_frames < len(samples):
        if max_frames < 2:
            raise ValueError(f"max_frames: expected at least 2, got {max_frames}")
        frames = np.sort(epoch_order(0, len(samples), seed=0)[:max_frames])
    transforms = number_transforms(data)

    def blocks(key: str) -> Iterator[np.ndarray]:
        for start in range(0, len(frames), BLOCK):
            numbers = samples.numbers(frames[start : start + BLOCK])
            values = apply(transforms, numbers)[key]
            yield values.reshape(-1, values.shape[-1])

    try:
        return NormStats(
            state=feature_stats(lambda: blocks("state")),
            actions=feature_stats(lambda: blocks("actions")),
        )
    except ValueError as error:
        raise ValueError(f"{samples.root}: {error}") from error


def norm_stats_folder(config: HasData) -> Path:
    """Where a config's statistics are read from."""
    assets = config.assets_dirs if config.data.assets_dir is None else Path(config.data.assets_dir)
    return assets / config.data.stats_id


def require_norm_stats(config: HasData) -> NormStats | None:
    """A config's statistics; None where its data is generated and needs none.

    Raises:
        FileNotFoundError: there are none; the message has the command that computes them.
        ValueError: the file holds something else, or the config names no dataset.
    """
    if config.data.fake:
        return None
    folder = norm_stats_folder(config)
    try:
        return NormStats.read(folder)
    except FileNotFoundError as error:
        base = str(config.assets_dirs.parent)
        command = ["--config_name", config.name, "--assets_base_dir", base]
        if config.data.repo_id is not None:
            command += ["--repo_id", config.data.repo_id]
        how = f"pruner compute-norm-stats {shlex.join(command)}"
        if config.data.assets_dir is not None:
            how += " (and leave data.assets_dir unset)"
        raise FileNotFoundError(f"{error}. To compute them: {how}") from None


def checkpoint_assets(config: HasData, stats: NormStats | None) -> Mapping[str, bytes]:
    """The files that go into a checkpoint's `assets`, by their path in there."""
    return {} if stats is None else {f"{config.data.stats_id}/{FILE}": stats.to_file()}
