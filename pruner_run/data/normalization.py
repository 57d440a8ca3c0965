"""Numbers of a robot in the range that models know, and the statistics that say how.

The files are openpi's: `<assets>/<asset_id>/norm_stats.json`, beside a config or in a checkpoint.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Float

from convert.assets import FILE, to_file
from pruner_run.files import write_atomically

EPSILON = 1e-6

_NAMES = ("mean", "std", "q01", "q99")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FeatureStats:
    """Statistics of each number of a feature.

    Attributes:
        mean, std: [A].
        q01, q99: [A], the 1st and 99th percentile; None where a file has none.

    Raises:
        ValueError: they are not vectors of finite numbers, all of one length.
    """

    mean: Float[np.ndarray, "A"]
    std: Float[np.ndarray, "A"]
    q01: Float[np.ndarray, "A"] | None = None
    q99: Float[np.ndarray, "A"] | None = None

    def __post_init__(self) -> None:
        given = {
            name: np.asarray(values, np.float64)
            for name, values in vars(self).items()
            if values is not None
        }
        for name, values in given.items():
            object.__setattr__(self, name, values)
        shapes = {name: list(values.shape) for name, values in given.items()}
        if self.mean.ndim != 1 or any(shape != shapes["mean"] for shape in shapes.values()):
            raise ValueError(f"statistics: expected vectors of one length, got {shapes}")
        if wrong := [name for name, values in given.items() if not np.isfinite(values).all()]:
            raise ValueError(f"statistics: expected finite numbers, got others in {wrong}")

    @classmethod
    def read(cls, root: str | Path, feature: str) -> Self:
        """Of a LeRobot dataset's feature, from its `meta/stats.json`.

        Only for datasets that `pruner_run` wrote: LeRobot's own quantiles are averages of the
        episodes'.

        Raises:
            FileNotFoundError: the dataset has no statistics.
            ValueError: they hold no mean, deviation and quantiles of the feature.
        """
        path = Path(root) / "meta" / "stats.json"
        stats = json.loads(path.read_text()).get(feature, {})
        if lacking := [name for name in _NAMES if name not in stats]:
            expected = ", ".join(_NAMES)
            raise ValueError(f"{path}: expected {expected} of {feature}, missing {lacking}")
        return cls(**{name: np.array(stats[name]) for name in _NAMES})

    @classmethod
    def from_dict(cls, stats: Mapping[str, Any]) -> Self:
        """From numbers by name; the quantiles may be missing."""
        if lacking := [name for name in ("mean", "std") if stats.get(name) is None]:
            raise ValueError(f"statistics: expected mean and std, missing {lacking}")
        return cls(**{name: stats[name] for name in _NAMES if stats.get(name) is not None})

    def __len__(self) -> int:
        return len(self.mean)

    def normalize(
        self, values: Float[np.ndarray, "*batch A"], *, quantiles: bool
    ) -> Float[np.ndarray, "*batch A"]:
        """Values about 0: z-scores, or for quantiles [-1, 1] between the 1st and 99th percentile.

        Statistics may be of more numbers than there are (those of a base model are padded).

        Raises:
            ValueError: they are of fewer; or there are no quantiles.
        """
        length = values.shape[-1]
        if length > len(self):
            found = f"those of {len(self)}"
            raise ValueError(f"statistics: expected those of {length} numbers or more, got {found}")
        offset, scale = self._offset_and_scale(length, quantiles)
        scaled = (values - offset) / scale
        if quantiles:
            scaled = scaled * 2.0 - 1.0
        return scaled.astype(values.dtype)

    def unnormalize(
        self, values: Float[np.ndarray, "*batch A"], *, quantiles: bool
    ) -> Float[np.ndarray, "*batch A"]:
        """The inverse of `normalize`. Numbers beyond the statistics, which are padding, stay."""
        length = min(values.shape[-1], len(self))
        offset, scale = self._offset_and_scale(length, quantiles)
        scaled = values[..., :length]
        if quantiles:
            scaled = (scaled + 1.0) / 2.0
        restored = np.concatenate([scaled * scale + offset, values[..., length:]], axis=-1)
        return restored.astype(values.dtype)

    def _offset_and_scale(self, length: int, quantiles: bool) -> tuple[np.ndarray, np.ndarray]:
        """What is subtracted and what is divided by, of the first `length` numbers."""
        if not quantiles:
            return self.mean[:length], self.std[:length] + EPSILON
        if self.q01 is None or self.q99 is None:
            raise ValueError("statistics: expected q01 and q99, for quantile normalisation")
        return self.q01[:length], self.q99[:length] - self.q01[:length] + EPSILON


@dataclasses.dataclass(frozen=True)
class NormStats:
    """What a norm_stats.json holds: how state and actions are normalised."""

    state: FeatureStats
    actions: FeatureStats

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """From `folder/norm_stats.json`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it holds something else.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected normalisation statistics, found no file")
        return cls.parse(str(path), path.read_bytes())

    @classmethod
    def parse(cls, path: str, data: bytes) -> Self:
        """From the contents of a norm_stats.json; its path is for errors.

        Raises:
            ValueError: it holds something else.
        """
        try:
            found = json.loads(data)["norm_stats"]
            features = {key: dict(found[key]) for key in ("state", "actions")}
        except (ValueError, KeyError, TypeError) as error:
            expected = "JSON with norm_stats of state and actions"
            raise ValueError(f"{path}: expected {expected}, got another file") from error
        try:
            return cls(**{key: FeatureStats.from_dict(stats) for key, stats in features.items()})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def identity(cls, length: int) -> Self:
        """Those of numbers that are normalised already, so that they stay as they are."""
        ones = np.ones(length)
        stats = FeatureStats(mean=0 * ones, std=ones - EPSILON, q01=-ones, q99=ones - EPSILON)
        return cls(state=stats, actions=stats)

    def write(self, folder: str | Path) -> Path:
        """To `folder/norm_stats.json`, which is there in full or not at all; returns its path."""
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.to_file())
        return path

    def to_file(self) -> bytes:
        """The contents of a norm_stats.json."""
        return to_file({key: vars(stats) for key, stats in vars(self).items()})
