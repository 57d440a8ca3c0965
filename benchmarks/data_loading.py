"""Data loading's speed: samples a second of `TrainingData`, by dataset and number of workers.

    python -m benchmarks.data_loading --output benchmarks/results/data_loading.json

Generated datasets: two cameras of 256x256 as PNG in parquet files, as LIBERO has them, in LeRobot
2.1 (one file an episode, 100 rows a group, as lerobot writes them) and 3.0 (by our writer); and
three cameras of 480x640 in mp4 files, as ALOHA has them. Each is measured twice: with images kept
in memory, all of which fit, and with none kept, as for a dataset that is far larger than memory.
The files themselves are in the operating system's cache.
"""

import dataclasses
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from pruner_run.assets import DEMO_TOKENIZER
from pruner_run.data import lerobot_table
from pruner_run.data.config import DataConfig
from pruner_run.data.lerobot import LeRobotDataset
from pruner_run.data.lerobot_features import Feature
from pruner_run.data.lerobot_writer import write_dataset
from pruner_run.data.loader import TrainingData
from pruner_run.data.norm_stats import dataset_norm_stats
from pruner_run.data.samples import CACHE_BYTES
from pruner_run.tokenizer import PromptTokenizer
from pruner_spec.config import CAMERAS, Pi0Config

MODEL = Pi0Config(pi05=True)
FPS = 10
_IMAGES = "observation.images."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Measure data loading.

    Attributes:
        workers: threads; 0 makes a batch when it is asked for.
        batch_size: samples a batch.
        episodes: of each dataset.
        frames: of each episode.
        seconds: that each row is timed for, after a first batch; where images are kept, after all
            of them were read.
        output: for the numbers, as JSON.
    """

    workers: tuple[int, ...] = (0, 1, 2, 4)
    batch_size: int = 32
    episodes: int = 4
    frames: int = 200
    seconds: float = 5.0
    output: Path | None = None


def main() -> None:
    """Writes the datasets, measures, and prints the table."""
    options = tyro.cli(Options, use_underscores=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = list(_rows(options, Path(folder)))
    Console(width=120).print(table(rows, options))
    if options.output is not None:
        machine = {"cores": len(os.sched_getaffinity(0)), "processor": platform.machine()}
        found = {"options": _plain(options), "machine": machine, "rows": rows}
        options.output.write_text(json.dumps(found, indent=2) + "\n")


def _rows(options: Options, folder: Path) -> Iterator[dict[str, Any]]:
    features = {f"{_IMAGES}{name}": Feature("image", (256, 256, 3)) for name in CAMERAS[:2]}
    _write(folder / "png30", features, options)
    _as_v21(folder / "png30", folder / "png21")
    videos = {f"{_IMAGES}{name}": Feature("video", (480, 640, 3)) for name in CAMERAS}
    _write(folder / "mp4", videos, options)
    for name, title in (
        ("png21", "2 x 256x256 PNG, 2.1"),
        ("png30", "2 x 256x256 PNG, 3.0"),
        ("mp4", "3 x 480x640 mp4, 3.0"),
    ):
        for kept in (False, True):
            for workers in options.workers:
                rate = measure(folder / name, options, workers, kept)
                yield {"dataset": title, "kept": kept, "workers": workers, "samples_s": rate}


def measure(root: Path, options: Options, workers: int, kept: bool) -> float:
    """Samples a second.

    Args:
        root: the dataset's folder.
        options: batch size and time.
        workers: threads.
        kept: whether images are kept in memory.
    """
    cameras = LeRobotDataset(root).cameras
    repack = {f"image/{camera.removeprefix(_IMAGES)}": camera for camera in cameras}
    repack |= {"state": "state", "actions": "actions"}
    data = DataConfig(repo_id=str(root), repack=repack, prompt_from_task=True)
    lerobot_table.recent.limit = lerobot_table.ROW_GROUP_BYTES if kept else 0
    with TrainingData(
        data,
        MODEL,
        dataset_norm_stats(data, MODEL.action_horizon),
        PromptTokenizer(DEMO_TOKENIZER, max_len=MODEL.max_token_len),
        seed=0,
        batch_size=options.batch_size,
        workers=workers,
        cache_bytes=CACHE_BYTES if kept else 0,
    ) as batches:
        for _ in range(1 + len(batches) // options.batch_size if kept else 1):
            next(batches)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < options.seconds:
            next(batches)
            count += options.batch_size
        return count / (time.perf_counter() - start)


def _write(root: Path, cameras: dict[str, Feature], options: Options) -> None:
    numbers = {"state": Feature("float32", (8,)), "actions": Feature("float32", (7,))}
    generator = np.random.default_rng(0)
    episodes = (_episode(generator, cameras, options.frames) for _ in range(options.episodes))
    write_dataset(root, episodes, fps=FPS, features=numbers | cameras)


def _episode(
    generator: np.random.Generator, cameras: dict[str, Feature], length: int
) -> dict[str, Any]:
    """Numbers, and coarse pictures that move, with a little noise: about as large as LIBERO's."""
    episode: dict[str, Any] = {
        "task": "put the bowl on the plate",
        "state": generator.uniform(-1, 1, (length, 8)).astype(np.float32),
        "actions": generator.uniform(-1, 1, (length, 7)).astype(np.float32),
    }
    for name, feature in cameras.items():
        height, width, _ = feature.shape
        coarse = Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8))
        scene = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
        frames = np.stack([np.roll(scene, 2 * frame, axis=1) for frame in range(length)])
        noise = generator.integers(0, 2, frames.shape, dtype=np.uint8)
        episode[name] = np.minimum(frames, 254) + noise
    return episode


def _as_v21(source: Path, root: Path) -> None:
    """A 3.0 dataset of images as lerobot's older version has it."""
    dataset = LeRobotDataset(source)
    (root / "meta").mkdir(parents=True)
    info = json.loads((source / "meta/info.json").read_text())
    data_path = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    info |= {"codebase_version": "v2.1", "data_path": data_path, "chunks_size": 1000}
    (root / "meta/info.json").write_text(json.dumps(info))
    episodes = []
    paths = dict.fromkeys(episode.data_path for episode in dataset.episodes)
    rows = pa.concat_tables([pq.read_table(path) for path in paths])
    for number, episode in enumerate(dataset.episodes):
        path = root / data_path.format(episode_chunk=0, episode_index=number)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = rows.slice(episode.start, len(episode))
        pq.write_table(part, path, row_group_size=100)
        one = {"episode_index": number, "tasks": list(episode.tasks), "length": len(episode)}
        episodes.append(one)
    tasks = [{"task_index": index, "task": task} for index, task in dataset.tasks.items()]
    for name, each in (("episodes", episodes), ("tasks", tasks)):
        lines = "".join(json.dumps(row) + "\n" for row in each)
        (root / f"meta/{name}.jsonl").write_text(lines)


def table(rows: list[dict[str, Any]], options: Options) -> Table:
    """A row a dataset, a column a number of workers."""
    title = f"samples/s, batch {options.batch_size}, {len(os.sched_getaffinity(0))} cores"
    found = Table(title=title, box=box.SIMPLE_HEAD)
    found.add_column("")
    found.add_column("images")
    for workers in options.workers:
        found.add_column(f"{workers} workers", justify="right")
    by_row: dict[tuple[str, bool], list[str]] = {}
    for row in rows:
        by_row.setdefault((row["dataset"], row["kept"]), []).append(f"{row['samples_s']:.0f}")
    for (dataset, kept), rates in by_row.items():
        found.add_row(dataset, "kept" if kept else "read anew", *rates)
    return found


def _plain(options: Options) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(options), default=str))


if __name__ == "__main__":
    main()
