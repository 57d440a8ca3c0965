"""What a LeRobot dataset says about itself, versions 2.1 and 3.0 alike.

The two differ in where this is written and in how many episodes share a file; `Metadata` hides it.
Everything is checked here against itself, so that a dataset that loads is one whose files fit.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruner_run.data.lerobot_features import CAMERA_DTYPES, INDEX_FEATURES, Feature
from pruner_run.data.lerobot_table import read_parquet

VERSIONS = ("v2.1", "v3.0")


@dataclass(frozen=True)
class VideoSpan:
    """Where an episode lies in a video file: the file, and seconds from its beginning."""

    path: Path
    start: float


@dataclass(frozen=True)
class Episode:
    """One episode: frames [start, stop) of the dataset, the rows `start`..`stop` of its columns."""

    index: int
    start: int
    stop: int
    tasks: tuple[str, ...]
    data_path: Path
    videos: dict[str, VideoSpan]

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Metadata:
    """A dataset's description; paths are absolute or relative as `root` was."""

    version: str
    fps: float
    robot_type: str | None
    features: dict[str, Feature]
    tasks: dict[int, str]
    episodes: tuple[Episode, ...]

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(key for key, feature in self.features.items() if feature.is_camera)


def read_metadata(root: Path) -> Metadata:
    """Reads and checks the files in `root/meta`.

    Raises:
        FileNotFoundError: If the dataset or one of its files is missing.
        ValueError: If a file says something else than it should; the message names it.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: expected the folder of a LeRobot dataset, found none")
    path = root / "meta" / "info.json"
    info = _read_json(path)
    version = _require(info, "codebase_version", str, path)
    if version not in VERSIONS:
        expected = " or ".join(VERSIONS)
        raise ValueError(f"{path}: expected codebase_version {expected}, got {version}")
    features = _read_features(info, path)
    videos = [key for key, feature in features.items() if feature.dtype == "video"]
    read_tasks, read_episodes = {
        "v2.1": (_read_tasks_v21, _read_episodes_v21),
        "v3.0": (_read_tasks_v30, _read_episodes_v30),
    }[version]
    metadata = Metadata(
        version=version,
        fps=_require(info, "fps", (int, float), path),
        robot_type=info.get("robot_type"),
        features=features,
        tasks=read_tasks(root),
        episodes=tuple(read_episodes(root, info, videos)),
    )
    _check(metadata, info, root)
    return metadata


def _check(metadata: Metadata, info: dict, root: Path) -> None:
    """Counts and order of the episodes; the files they are in."""
    path = root / "meta" / "info.json"
    if not metadata.fps > 0:
        raise ValueError(f"{path}: expected fps above 0, got {metadata.fps}")
    stop = 0
    for number, episode in enumerate(metadata.episodes):
        if (episode.index, episode.start) != (number, stop) or len(episode) <= 0:
            raise ValueError(
                f"{root / 'meta'}: expected episode {number} from frame {stop} on, "
                f"got episode {episode.index} with frames [{episode.start}, {episode.stop})"
            )
        stop = episode.stop
    for key, found in (("total_episodes", len(metadata.episodes)), ("total_frames", stop)):
        if (total := _require(info, key, int, path)) != found:
            raise ValueError(f"{path}: expected {key} {found}, as its episodes have, got {total}")
    used = {episode.data_path for episode in metadata.episodes}
    used |= {span.path for episode in metadata.episodes for span in episode.videos.values()}
    if missing := sorted(str(file) for file in used if not file.is_file()):
        raise FileNotFoundError(f"{root}: expected these files, found none: {', '.join(missing)}")


def _read_features(info: dict, path: Path) -> dict[str, Feature]:
    features = {}
    for key, value in _require(info, "features", dict, path).items():
        shape = tuple(_require(value, "shape", (list, tuple), path))
        dtype = _require(value, "dtype", str, path)
        if dtype in CAMERA_DTYPES:
            if len(shape) == 3 and shape[0] == 3 != shape[2]:
                shape = (*shape[1:], 3)  # some datasets declare channels first; images never are
            if len(shape) != 3 or shape[2] != 3:
                raise ValueError(f"{path}: expected {key} of shape [H, W, 3], got {list(shape)}")
        features[key] = Feature(dtype, shape, value.get("names"))
    if missing := sorted(INDEX_FEATURES.keys() - features.keys()):
        raise ValueError(f"{path}: expected the features {missing}, got {sorted(features)}")
    return features


def _read_tasks_v21(root: Path) -> dict[int, str]:
    path = root / "meta" / "tasks.jsonl"
    rows = _read_json_lines(path)
    return {_require(r, "task_index", int, path): _require(r, "task", str, path) for r in rows}


def _read_tasks_v30(root: Path) -> dict[int, str]:
    """The texts are the index of a pandas frame, whose name differs between versions of lerobot."""
    path = root / "meta" / "tasks.parquet"
    table = read_parquet(path, require=["task_index"])
    names = [name for name in table.column_names if name != "task_index"]
    if len(names) != 1:
        raise ValueError(f"{path}: expected task_index and the texts, got {table.column_names}")
    return dict(zip(table["task_index"].to_pylist(), table[names[0]].to_pylist(), strict=True))


def _read_episodes_v21(root: Path, info: dict, videos: list[str]) -> Iterator[Episode]:
    path = root / "meta" / "episodes.jsonl"
    chunks_size = _require(info, "chunks_size", int, root / "meta" / "info.json")
    start = 0
    for row in _read_json_lines(path):
        index = _require(row, "episode_index", int, path)
        stop = start + _require(row, "length", int, path)
        place = {"episode_chunk": index // chunks_size, "episode_index": index}
        yield Episode(
            index=index,
            start=start,
            stop=stop,
            tasks=tuple(_require(row, "tasks", list, path)),
            data_path=_file(root, info, "data_path", **place),
            videos={
                key: VideoSpan(_file(root, info, "video_path", video_key=key, **place), start=0.0)
                for key in videos
            },
        )
        start = stop


def _read_episodes_v30(root: Path, info: dict, videos: list[str]) -> Iterator[Episode]:
    folder = root / "meta" / "episodes"
    columns = ["episode_index", "tasks", "dataset_from_index", "dataset_to_index"]
    columns += ["data/chunk_index", "data/file_index"]
    for key in videos:
        columns += [f"videos/{key}/{c}" for c in ("chunk_index", "file_index", "from_timestamp")]
    paths = sorted(folder.glob("*/*.parquet"))
    if not paths:
        raise FileNotFoundError(f"{folder}: expected chunk-000/file-000.parquet, found no file")
    tables = [read_parquet(path, columns, require=columns) for path in paths]
    rows = [row for table in tables for row in table.to_pylist()]

    def place(row: dict, what: str) -> dict[str, int]:
        return {name: row[f"{what}/{name}"] for name in ("chunk_index", "file_index")}

    for row in sorted(rows, key=lambda row: row["episode_index"]):
        yield Episode(
            index=row["episode_index"],
            start=row["dataset_from_index"],
            stop=row["dataset_to_index"],
            tasks=tuple(row["tasks"]),
            data_path=_file(root, info, "data_path", **place(row, "data")),
            videos={
                key: VideoSpan(
                    _file(root, info, "video_path", video_key=key, **place(row, f"videos/{key}")),
                    start=row[f"videos/{key}/from_timestamp"],
                )
                for key in videos
            },
        )


def _file(root: Path, info: dict, template: str, **place: Any) -> Path:
    """A path that info.json gives as a template."""
    path = root / "meta" / "info.json"
    try:
        return root / _require(info, template, str, path).format(**place)
    except (KeyError, IndexError) as error:
        expected = ", ".join(place)
        raise ValueError(f"{path}: expected {template} of {expected}, got {error}") from error


def _read_json(path: Path) -> dict:
    return _parse_object(_read_text(path), str(path))


def _read_json_lines(path: Path) -> list[dict]:
    lines = enumerate(_read_text(path).splitlines(), start=1)
    return [_parse_object(line, f"{path}:{number}") for number, line in lines if line.strip()]


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a JSON file, found none")
    return path.read_text(encoding="utf-8")


def _parse_object(text: str, where: str) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected JSON, got {text[:40]!r}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {text[:40]!r}")
    return value


def _require(row: dict, key: str, kind: type | tuple[type, ...], path: Path) -> Any:
    """The value of a key that has to be there, of a given type."""
    if not isinstance(row.get(key), kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join(k.__name__ for k in kinds)
        raise ValueError(f"{path}: expected {key}, of type {expected}, got {row.get(key)!r}")
    return row[key]
