"""Intervals of shares: what n episodes say of how often a policy succeeds, and of two policies."""

import dataclasses
import math
from statistics import NormalDist

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


@dataclasses.dataclass(frozen=True)
class Share:
    """Successes out of trials, with Wilson's score interval (1927) of 95 %.

    Attributes:
        successes: how many.
        trials: out of how many.
    """

    successes: int
    trials: int

    def __post_init__(self) -> None:
        if not 0 <= self.successes <= self.trials or not self.trials:
            raise ValueError(f"successes: expected 0 to all of at least one trial, got {self}")

    @property
    def value(self) -> float:
        """The share itself."""
        return self.successes / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        """The shares that the trials do not contradict, from the least to the largest."""
        n, p, zz = self.trials, self.value, _Z**2
        middle = (p + zz / (2 * n)) / (1 + zz / n)
        half = _Z / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
        low = middle - half if self.successes else 0.0  # exactly, as rounding would not have it
        high = middle + half if self.successes < n else 1.0
        return low, high


def difference_interval(first: Share, second: Share) -> tuple[float, float]:
    """Of the second share less the first: Newcombe's hybrid score interval (1998, method 10), 95 %.

    The trials are taken to be independent, also where both had the same seeds; the interval is then
    rather too wide.
    """
    (low_1, high_1), (low_2, high_2) = first.interval, second.interval
    difference = second.value - first.value
    below = math.hypot(second.value - low_2, high_1 - first.value)
    above = math.hypot(high_2 - second.value, first.value - low_1)
    return difference - below, difference + above
