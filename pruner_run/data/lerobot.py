"""Reading LeRobot datasets, versions 2.1 and 3.0, from a local folder, without lerobot.

The numbers of all frames are held in memory (a million frames of a bimanual robot take about
120 MB); images are decoded when asked for, from mp4 files or from the parquet files themselves.
"""

import bisect
import io
import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt8
from PIL import Image

from pruner_run.data.lerobot_metadata import Episode, Feature, read_metadata, read_parquet
from pruner_run.data.video import read_frames


class LeRobotDataset:
    """A dataset as a sequence of frames.

    A feature of shape [1] is a scalar, as it is to lerobot; the others have their declared shape.

    Attributes:
        root: The dataset's folder.
        fps: Frames a second.
        features: Name -> dtype and shape, in the dataset's order.
        cameras: Names of the features that are images.
        tasks: Task index -> instruction.
        episodes: Where each episode begins and ends, its instructions and its files.
        columns: Name -> the values of all frames, [frames, ...], for every feature but the cameras.
    """

    def __init__(self, root: str | Path):
        """Reads the metadata and the numbers, and checks them against each other.

        Raises:
            FileNotFoundError: If the dataset or one of its files is missing.
            ValueError: If a file holds something else than it should; the message names it.
        """
        self.root = Path(root)
        metadata = read_metadata(self.root)
        self.version = metadata.version
        self.fps = metadata.fps
        self.robot_type = metadata.robot_type
        self.features = metadata.features
        self.cameras = metadata.cameras
        self.tasks = metadata.tasks
        self.episodes = metadata.episodes
        self.columns = self._read_columns()

    def __len__(self) -> int:
        """Number of frames."""
        return self.episodes[-1].stop if self.episodes else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One frame: its numbers, its images (uint8 [H, W, 3]) and its instruction ("task").

        Raises:
            IndexError: If there is no such frame.
            ValueError: If an image is damaged or not of the declared size.
        """
        index = range(len(self))[index]
        episode = self.episodes[self.columns["episode_index"][index]]
        frame = {key: np.array(values[index]) for key, values in self.columns.items()}
        for camera in self.cameras:
            frame[camera] = self._images(episode, camera, index - episode.start, count=1)[0]
        return frame | {"task": self.tasks[int(frame["task_index"])]}

    def episode(self, number: int, *, cameras: Sequence[str] = ()) -> dict[str, Any]:
        """All frames of an episode, stacked: [T, ...] for each feature, T strings for "task".

        Args:
            number: Which episode.
            cameras: The cameras to decode, as uint8 [T, H, W, 3]; none unless asked for.

        Raises:
            IndexError: If there is no such episode.
            ValueError: If there is no such camera, or as for a frame.
        """
        episode = self.episodes[range(len(self.episodes))[number]]
        if unknown := sorted(set(cameras) - set(self.cameras)):
            raise ValueError(f"cameras: expected some of {self.cameras}, got {unknown}")
        frames = {k: v[episode.start : episode.stop].copy() for k, v in self.columns.items()}
        for camera in cameras:
            frames[camera] = self._images(episode, camera, 0, count=len(episode))
        return frames | {"task": [self.tasks[int(index)] for index in frames["task_index"]]}

    def _images(
        self, episode: Episode, camera: str, first: int, *, count: int
    ) -> UInt8[np.ndarray, "T H W 3"]:
        """Frames [first, first + count) of an episode as one camera saw them."""
        feature = self.features[camera]
        if feature.dtype == "video":
            span = episode.videos[camera]
            path, start = span.path, span.start + first / self.fps
            images = read_frames(path, start=start, count=count, fps=self.fps)
        else:
            path = episode.data_path
            row = episode.start - self._first_frames[path] + first
            images = np.stack([_read_image(path, camera, row + i) for i in range(count)])
        if images.shape[1:] != feature.shape:
            found = list(images.shape[1:])
            raise ValueError(f"{path}: expected {camera} of {list(feature.shape)}, got {found}")
        return images

    def _read_columns(self) -> dict[str, np.ndarray]:
        """Every feature but the cameras. Also notes which frame each file begins with."""
        features = {key: f for key, f in self.features.items() if not f.is_camera}
        stored = [key for key, feature in self.features.items() if feature.dtype != "video"]
        parts: dict[str, list[np.ndarray]] = {key: [] for key in features}
        self._first_frames: dict[Path, int] = {}
        rows = 0
        for path in dict.fromkeys(episode.data_path for episode in self.episodes):
            table = read_parquet(path, list(features), require=stored)
            self._first_frames[path] = rows
            rows += len(table)
            for key, feature in features.items():
                parts[key].append(_to_numpy(table[key], feature, f"{path}: {key}"))
        columns = {key: np.concatenate(part) for key, part in parts.items() if part}
        self._check_indices(columns)
        return columns

    def _check_indices(self, columns: dict[str, np.ndarray]) -> None:
        """The rows are the episodes' frames, one after the other, and their tasks are known."""
        lengths = [len(episode) for episode in self.episodes]
        starts = np.repeat([episode.start for episode in self.episodes], lengths)
        expected = {
            "index": np.arange(len(self)),
            "episode_index": np.repeat(np.arange(len(self.episodes)), lengths),
            "frame_index": np.arange(len(self)) - starts,
        }
        data = self.root / "data"
        for key, values in expected.items() if columns else ():
            if len(columns[key]) != len(values):
                raise ValueError(f"{data}: expected {len(values)} rows, got {len(columns[key])}")
            for row in np.flatnonzero(columns[key] != values)[:1]:
                found = columns[key][row]
                raise ValueError(f"{data}: expected {key} {values[row]} in row {row}, got {found}")
        if unknown := sorted(set(columns.get("task_index", np.empty(0)).tolist()) - set(self.tasks)):
            raise ValueError(f"{data}: expected a task_index of {self.tasks}, got {unknown}")


def _to_numpy(column: pa.ChunkedArray, feature: Feature, where: str) -> np.ndarray:
    """A column of numbers, or of lists of them, as [rows, *shape], or [rows] for scalars."""
    shape = (len(column),) if feature.shape == (1,) else (len(column), *feature.shape)
    values = _innermost(column.combine_chunks())
    if values.null_count or len(values) != math.prod(shape):
        found = f"{len(values) - values.null_count} numbers"
        raise ValueError(f"{where}: expected {list(shape)} without nulls, got {found}")
    if feature.dtype == "string":
        return np.array(values.to_pylist(), dtype=object).reshape(shape)
    try:
        numbers = values.to_numpy(zero_copy_only=False)
        return numbers.astype(feature.dtype, casting="same_kind").reshape(shape)
    except TypeError:
        raise ValueError(f"{where}: expected {feature.dtype}, got {column.type}") from None


def _innermost(values: pa.Array) -> pa.Array:
    """The numbers in lists of lists of ... them."""
    if isinstance(values, pa.ExtensionArray):  # `datasets` makes one for matrices
        return _innermost(values.storage)
    if isinstance(values, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        return _innermost(values.flatten())
    return values


def _read_image(path: Path, column: str, row: int) -> UInt8[np.ndarray, "H W 3"]:
    """One image out of a parquet file, which holds them as encoded files."""
    modified = path.stat().st_mtime_ns
    starts = _row_group_starts(path, modified)
    group = bisect.bisect_right(starts, row) - 1
    try:
        image = _read_row_group(path, modified, column, group)[row - starts[group]].as_py()
        return np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB"))
    except (TypeError, KeyError, OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: expected an image in row {row} of {column}") from error


@lru_cache(maxsize=256)
def _row_group_starts(path: Path, modified: int) -> list[int]:
    """First row of each row group; `modified` is the file's time, so that a new file is read."""
    metadata = pq.read_metadata(path)
    lengths = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return [0, *itertools.accumulate(lengths)][:-1]


@lru_cache(maxsize=8)
def _read_row_group(path: Path, modified: int, column: str, group: int) -> pa.ChunkedArray:
    """A column of the row group, the smallest part of a parquet file that can be read."""
    with pq.ParquetFile(path) as file:
        return file.read_row_group(group, [column])[column]
