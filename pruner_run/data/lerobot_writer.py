"""Writing LeRobot datasets, version 3.0.

A dataset appears complete or not at all: it is written beside its place and renamed. Its statistics
are those of all frames, where lerobot averages the quantiles of the episodes.
"""

import contextlib
import json
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pruner_run.data.lerobot_features import INDEX_FEATURES, Feature
from pruner_run.data.lerobot_stats import column_stats, image_histogram, image_stats
from pruner_run.data.lerobot_table import make_schema, to_arrow
from pruner_run.data.video import LEROBOT_ENCODING, Encoding, VideoWriter

FILES_PER_CHUNK = 1000
DATA_FILE_MB, VIDEO_FILE_MB = 100, 200
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
IMAGE_ROW_GROUP = 8  # rows; reading one image reads the whole group


def write_dataset(
    root: str | Path,
    episodes: Iterable[Mapping[str, Any]],
    *,
    fps: int,
    features: Mapping[str, Feature],
    robot_type: str | None = None,
    encoding: Encoding = LEROBOT_ENCODING,
) -> None:
    """Writes a dataset; its folder is there once all of it is.

    Args:
        root: The dataset's folder, which must not exist.
        episodes: In order. Each maps "task" to its instruction and every feature to its values in
            all frames, [T, *shape], or [T] if the shape is [1]; a camera's are uint8 [T, H, W, 3].
        fps: Frames a second.
        features: The features, without the five that every dataset has (time and indices). A
            camera of dtype "video" goes into mp4 files, of dtype "image" unchanged into parquet.
        robot_type: The robot's name.
        encoding: How videos are compressed.

    Raises:
        FileExistsError: If `root` exists.
        ValueError: If there is no episode, or one is not as `features` says.
    """
    root = Path(root)
    if root.exists():
        raise FileExistsError(f"{root}: expected a folder that does not exist yet")
    partial = root.parent / f".{root.name}.{uuid.uuid4().hex}.partial"
    writer = _Writer(partial, fps=fps, features=dict(features), encoding=encoding)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, partial, ignore_errors=True)  # nothing there after a success
        stack.callback(writer.close)
        for episode in episodes:
            writer.add(episode)
        writer.finish(robot_type)
        partial.rename(root)


class _Writer:
    """A dataset in the making: its current files, and what is known of the episodes so far."""

    def __init__(self, root: Path, *, fps: int, features: dict[str, Feature], encoding: Encoding):
        if reserved := sorted(features.keys() & (INDEX_FEATURES.keys() | {"task"})):
            raise ValueError(f"features: {reserved} are written by the writer itself")
        if slashes := sorted(key for key in features if "/" in key):
            raise ValueError(f"features: expected names without '/', got {slashes}")
        self._root = root
        self._fps = fps
        self._features = features
        self._encoding = encoding
        self._files: _Files | None = None
        self._files_begun = 0
        self._frames = 0
        self._tasks: dict[str, int] = {}
        self._rows: list[dict[str, Any]] = []  # of meta/episodes
        self._columns: list[dict[str, np.ndarray]] = []  # an episode each
        self._histograms: dict[str, np.ndarray] = {}

    def add(self, episode: Mapping[str, Any]) -> None:
        """Appends an episode."""
        number = len(self._rows)
        length = _check_episode(episode, self._features, f"episode {number}")
        columns = {
            key: np.asarray(episode[key], _numpy_dtype(feature))
            for key, feature in self._features.items()
            if not feature.is_camera
        }
        columns |= self._index_columns(length, episode["task"])
        cameras = {key: episode[key] for key, f in self._features.items() if f.is_camera}
        if self._files is None:
            self._files = _Files(
                self._root, self._files_begun, self._fps, self._features, self._encoding
            )
            self._files_begun += 1
        self._rows.append(
            {
                "episode_index": number,
                "tasks": [episode["task"]],
                "length": length,
                "dataset_from_index": self._frames,
                "dataset_to_index": self._frames + length,
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
                **self._files.add(columns, cameras),
                **self._episode_stats(columns, cameras, length),
            }
        )
        self._columns.append(columns)
        self._frames += length
        if self._files.full:
            self.close()

    def finish(self, robot_type: str | None) -> None:
        """Closes the files and writes `meta`."""
        if not self._rows:
            raise ValueError("episodes: expected at least one, got none")
        self.close()
        meta = self._root / "meta"
        (meta / "episodes" / "chunk-000").mkdir(parents=True)
        rows = pa.Table.from_pylist(self._rows)
        pq.write_table(rows, meta / "episodes" / "chunk-000" / "file-000.parquet")
        _write_tasks(meta / "tasks.parquet", self._tasks)
        _write_json(meta / "stats.json", self._dataset_stats())
        _write_json(meta / "info.json", self._info(robot_type))

    def close(self) -> None:
        """Closes the current files, so that the next episode begins new ones."""
        if self._files is not None:
            self._files.close()
            self._files = None

    def _index_columns(self, length: int, task: str) -> dict[str, np.ndarray]:
        frame = np.arange(length)
        columns = {
            "timestamp": frame / self._fps,
            "frame_index": frame,
            "episode_index": np.full(length, len(self._rows)),
            "index": frame + self._frames,
            "task_index": np.full(length, self._tasks.setdefault(task, len(self._tasks))),
        }
        return {key: columns[key].astype(f.dtype) for key, f in INDEX_FEATURES.items()}

    def _episode_stats(
        self, columns: dict[str, np.ndarray], cameras: dict[str, np.ndarray], length: int
    ) -> dict[str, Any]:
        """The columns "stats/..." of meta/episodes; adds the images to the dataset's."""
        stats = {key: column_stats(v) for key, v in columns.items() if _is_number(v)}
        for key, images in cameras.items():
            histogram = image_histogram(images)
            stats[key] = image_stats(histogram, length)
            self._histograms[key] = self._histograms.get(key, 0) + histogram
        return {
            f"stats/{key}/{name}": value.tolist()
            for key, values in stats.items()
            for name, value in values.items()
        }

    def _dataset_stats(self) -> dict[str, dict[str, list]]:
        stats = {key: image_stats(h, self._frames) for key, h in self._histograms.items()}
        for key in self._columns[0]:
            values = np.concatenate([columns[key] for columns in self._columns])
            if _is_number(values):
                stats[key] = column_stats(values)
        return {key: {n: v.tolist() for n, v in values.items()} for key, values in stats.items()}

    def _info(self, robot_type: str | None) -> dict[str, Any]:
        features = {}
        for key, feature in (self._features | INDEX_FEATURES).items():
            features[key] = {
                "dtype": feature.dtype,
                "shape": list(feature.shape),
                "names": ["height", "width", "channels"] if feature.is_camera else feature.names,
            }
            if feature.dtype == "video":
                features[key]["info"] = self._encoding.info(feature.shape, self._fps)
        return {
            "codebase_version": "v3.0",
            "robot_type": robot_type,
            "total_episodes": len(self._rows),
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": DATA_FILE_MB,
            "video_files_size_in_mb": VIDEO_FILE_MB,
            "fps": self._fps,
            "splits": {"train": f"0:{len(self._rows)}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if "video" in _dtypes(self._features) else None,
            "features": features,
        }


class _Files:
    """A data file and a video file a camera, being written; they hold the same episodes."""

    def __init__(
        self, root: Path, number: int, fps: int, features: dict[str, Feature], encoding: Encoding
    ):
        chunk, file = divmod(number, FILES_PER_CHUNK)
        self._place = {"chunk_index": chunk, "file_index": file}
        self._fps = fps
        self._features = features | INDEX_FEATURES
        path = root / DATA_PATH.format(**self._place)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._schema = make_schema(self._features)
        self._data = pq.ParquetWriter(
            path, self._schema, compression="snappy", write_page_checksum=True
        )
        self._data_bytes = 0
        self._videos = {
            key: VideoWriter(
                root / VIDEO_PATH.format(video_key=key, **self._place),
                fps=fps,
                height=feature.shape[0],
                width=feature.shape[1],
                encoding=encoding,
            )
            for key, feature in features.items()
            if feature.dtype == "video"
        }

    def add(self, columns: dict[str, np.ndarray], cameras: dict[str, np.ndarray]) -> dict[str, Any]:
        """Appends an episode; returns where it went, as meta/episodes says it."""
        place: dict[str, Any] = {f"data/{name}": value for name, value in self._place.items()}
        for key, video in self._videos.items():
            start = video.frames / self._fps
            for image in cameras[key]:
                video.add(image)
            place |= {f"videos/{key}/{name}": value for name, value in self._place.items()}
            place[f"videos/{key}/from_timestamp"] = start
            place[f"videos/{key}/to_timestamp"] = video.frames / self._fps
        values = columns | cameras
        table = pa.table(
            [to_arrow(values[field.name], field.type) for field in self._schema],
            schema=self._schema,
        )
        has_images = "image" in _dtypes(self._features)
        self._data.write_table(table, row_group_size=IMAGE_ROW_GROUP if has_images else None)
        self._data_bytes += table.nbytes
        return place

    @property
    def full(self) -> bool:
        """Whether the next episode should begin new files."""
        videos = max((video.bytes for video in self._videos.values()), default=0)
        return self._data_bytes >= DATA_FILE_MB << 20 or videos >= VIDEO_FILE_MB << 20

    def close(self) -> None:
        self._data.close()
        for video in self._videos.values():
            video.close()


def _check_episode(episode: Mapping[str, Any], features: dict[str, Feature], where: str) -> int:
    """The number of its frames, if it is as `features` says."""
    if episode.keys() != features.keys() | {"task"}:
        expected = sorted(features.keys() | {"task"})
        raise ValueError(f"{where}: expected {expected}, got {sorted(episode)}")
    lengths = {key: len(episode[key]) for key in features}
    if len(set(lengths.values())) != 1 or not min(lengths.values()):
        raise ValueError(f"{where}: expected as many frames of each feature, got {lengths}")
    for key, feature in features.items():
        values = np.asarray(episode[key])
        shape = () if feature.shape == (1,) else feature.shape
        if values.shape[1:] != shape:
            expected, got = ["T", *shape], ["T", *values.shape[1:]]
            raise ValueError(f"{where}: expected {key} of shape {expected}, got {got}")
        dtype, casting = _numpy_dtype(feature), "no" if feature.is_camera else "same_kind"
        if not np.can_cast(values.dtype, dtype, casting):
            raise ValueError(f"{where}: expected {key} of dtype {dtype}, got {values.dtype}")
    return max(lengths.values())


def _numpy_dtype(feature: Feature) -> np.dtype:
    if feature.is_camera:
        return np.dtype(np.uint8)
    return np.dtype(str if feature.dtype == "string" else feature.dtype)


def _dtypes(features: Mapping[str, Feature]) -> set[str]:
    return {feature.dtype for feature in features.values()}


def _is_number(values: np.ndarray) -> bool:
    return values.dtype.kind in "biuf"


def _write_tasks(path: Path, tasks: dict[str, int]) -> None:
    """A pandas frame with the texts as its index, which is what lerobot reads."""
    table = pa.table({"task_index": list(tasks.values()), "__index_level_0__": list(tasks)})
    pandas = {
        "index_columns": ["__index_level_0__"],
        "column_indexes": [],
        "columns": [
            {"name": "task_index", "field_name": "task_index", "pandas_type": "int64",
             "numpy_type": "int64", "metadata": None},
            {"name": None, "field_name": "__index_level_0__", "pandas_type": "unicode",
             "numpy_type": "object", "metadata": None},
        ],
    }  # fmt: skip
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(pandas)}), path)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
