"""What a frame of a LeRobot dataset is made of."""

from dataclasses import dataclass
from typing import Any

CAMERA_DTYPES = ("image", "video")


@dataclass(frozen=True)
class Feature:
    """One column of a dataset, or one camera.

    Attributes:
        dtype: A NumPy dtype's name, "string", "image" (in the parquet file) or "video" (in an mp4).
        shape: Shape of one frame's value; a camera's is [H, W, 3].
        names: Names along the axes, as LeRobot has them (for vectors one name an element).
    """

    dtype: str
    shape: tuple[int, ...]
    names: Any = None

    @property
    def is_camera(self) -> bool:
        return self.dtype in CAMERA_DTYPES


INDEX_FEATURES = {
    "timestamp": Feature("float32", (1,)),
    "frame_index": Feature("int64", (1,)),
    "episode_index": Feature("int64", (1,)),
    "index": Feature("int64", (1,)),
    "task_index": Feature("int64", (1,)),
}
"""The columns that every dataset has beside its own."""
