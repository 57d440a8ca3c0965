"""Reading LeRobot datasets, versions 2.1 and 3.0, from a local folder, without lerobot.

The numbers of all frames are held in memory (a million frames of a bimanual robot take about
120 MB); images are decoded when asked for, from mp4 files or from the parquet files themselves.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from pruner_run.data.lerobot_metadata import Episode, read_metadata
from pruner_run.data.lerobot_table import read_image, read_parquet, to_numpy
from pruner_run.data.video import read_frames


class LeRobotDataset:
    """A dataset as a sequence of frames.

    A feature of shape [1] is a scalar, as it is to lerobot; the others have their declared shape.

    Attributes:
        root: The dataset's folder.
        version: "v2.1" or "v3.0".
        fps: Frames a second.
        robot_type: The robot's name, if given.
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
        frame = {key: np.array(values[index]) for key, values in self.columns.items()}
        frame |= {camera: self.image(index, camera) for camera in self.cameras}
        return frame | {"task": self.tasks[int(frame["task_index"])]}

    def image(self, index: int, camera: str) -> UInt8[np.ndarray, "H W 3"]:
        """One frame as one camera saw it. Errors as for a frame."""
        episode = self.episodes[self.columns["episode_index"][index]]
        return self._images(episode, camera, index - episode.start, count=1)[0]

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
            images = np.stack([read_image(path, camera, row + i) for i in range(count)])
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
                parts[key].append(to_numpy(table[key], feature, f"{path}: {key}"))
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
        for key, values in expected.items() if columns else ():
            if len(columns[key]) != len(values):
                found = len(columns[key])
                raise ValueError(f"{self.root / 'data'}: expected {len(values)} rows, got {found}")
            for row in np.flatnonzero(columns[key] != values)[:1]:
                path, first = self._data_file(row)
                expect = f"{key} {values[row]} in row {row - first}"
                raise ValueError(f"{path}: expected {expect}, got {columns[key][row]}")
        for row in np.flatnonzero(~np.isin(columns.get("task_index", []), list(self.tasks)))[:1]:
            path, first = self._data_file(row)
            expect = f"the task_index of one of {len(self.tasks)} tasks in row {row - first}"
            raise ValueError(f"{path}: expected {expect}, got {columns['task_index'][row]}")

    def _data_file(self, frame: int) -> tuple[Path, int]:
        """The data file that holds a frame, and its first frame."""
        paths = [(path, first) for path, first in self._first_frames.items() if first <= frame]
        return paths[-1]
