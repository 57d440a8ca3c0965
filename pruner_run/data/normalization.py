"""Numbers of a robot in the range that models know, by the statistics a dataset carries."""

import dataclasses
import json
from pathlib import Path
from typing import Self

import numpy as np
from jaxtyping import Float

EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class Quantiles:
    """The 1st and 99th percentile of each number of a feature, which become -1 and 1, as in openpi.

    Attributes:
        q01: [A].
        q99: [A].
    """

    q01: Float[np.ndarray, "A"]
    q99: Float[np.ndarray, "A"]

    @classmethod
    def read(cls, root: str | Path, feature: str) -> Self:
        """Of a LeRobot dataset's feature, from its `meta/stats.json`.

        Raises:
            FileNotFoundError: the dataset has no statistics.
            ValueError: they hold no quantiles of the feature.
        """
        path = Path(root) / "meta" / "stats.json"
        stats = json.loads(path.read_text()).get(feature, {})
        if lacking := [name for name in ("q01", "q99") if name not in stats]:
            raise ValueError(f"{path}: expected q01 and q99 of {feature}, missing {lacking}")
        return cls(q01=np.array(stats["q01"]), q99=np.array(stats["q99"]))

    def normalize(self, values: Float[np.ndarray, "*batch A"]) -> Float[np.ndarray, "*batch A"]:
        """Values in [-1, 1] where they are within the quantiles, and beyond where they are not."""
        scaled = (values - self.q01) / (self.q99 - self.q01 + EPSILON) * 2.0 - 1.0
        return scaled.astype(values.dtype)
