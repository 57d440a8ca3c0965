"""What users see of the pruning: how many patches were kept, and whether it collapsed."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool


@dataclasses.dataclass(eq=False)
class PrunerRecord:
    """What a model remembers between calls; compared by identity, so that JAX sees a constant.

    Attributes:
        noise_scale: set by a user in place of the config's or the schedule's; None where not.
        last: the tokens and the selection of the last sampled batch, as the backend holds them.
    """

    noise_scale: float | None = None
    last: Any = None

    def set_noise_scale(self, noise_scale: float | None) -> None:
        """Raises ValueError unless the scale is None, or a finite number >= 0."""
        if noise_scale is not None and not 0 <= noise_scale < float("inf"):
            raise ValueError(f"noise_scale: expected None or a number >= 0, got {noise_scale!r}")
        self.noise_scale = noise_scale


def kept_counts(
    cameras: Sequence[str], kept: Bool[np.ndarray, "B C N"], nonfinite: np.ndarray
) -> dict[str, Any]:
    """The part of the statistics that a selection itself tells.

    Returns:
        kept_per_sample: patches kept, a number a sample.
        kept_per_camera: the same by camera.
        nonfinite_scores: scores that were not finite, a number a sample.
    """
    per_camera = kept.sum(axis=-1)
    return {
        "kept_per_sample": per_camera.sum(axis=-1).tolist(),
        "kept_per_camera": {
            camera: per_camera[:, place].tolist() for place, camera in enumerate(cameras)
        },
        "nonfinite_scores": nonfinite.tolist(),
    }
