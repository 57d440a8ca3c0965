"""LeRobot datasets: what is written is read back, 2.1 and 3.0 alike, and damage is named."""

import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from parity_tests.tolerances import tolerance
from pruner_run.assets import DEMO_EPISODE
from pruner_run.data import lerobot_table, lerobot_writer
from pruner_run.data.lerobot import LeRobotDataset
from pruner_run.data.lerobot_features import Feature
from pruner_run.data.lerobot_writer import write_dataset
from pruner_run.data.video import Encoding, VideoWriter, read_frames

FPS = 10
VIDEO, IMAGE = "observation.images.base_0_rgb", "observation.images.left_wrist_0_rgb"
FEATURES = {
    "observation.state": Feature("float32", (5,), list("abcde")),
    "action": Feature("float64", (3,)),
    "reward": Feature("float32", (1,)),
    "note": Feature("string", (1,)),
    VIDEO: Feature("video", (48, 64, 3)),
    IMAGE: Feature("image", (40, 56, 3)),
}
TASKS = ("pick up the cup", "open the drawer", "pick up the cup")
LENGTHS = (7, 4, 5)


def make_episode(rng: np.random.Generator, task: str, length: int) -> dict:
    """A bar that moves a little each frame, over a gradient: each frame differs from the next."""
    video = np.empty((length, 48, 64, 3), np.uint8)
    video[:] = np.linspace(20, 120, 64, dtype=np.uint8)[None, None, :, None]
    offset = rng.integers(8)
    for t in range(length):
        video[t, :, offset + 6 * t : offset + 6 * t + 10] = (230, 220, 200)
    return {
        "task": task,
        "observation.state": rng.normal(size=(length, 5)).astype(np.float32),
        "action": rng.normal(size=(length, 3)),
        "reward": rng.normal(size=length).astype(np.float32),
        "note": [f"frame {t}" for t in range(length)],
        VIDEO: video,
        IMAGE: rng.integers(0, 256, (length, 40, 56, 3), dtype=np.uint8),
    }


@pytest.fixture(scope="module")
def episodes() -> list[dict]:
    rng = np.random.default_rng(0)
    return [make_episode(rng, *task) for task in zip(TASKS, LENGTHS, strict=True)]


def write_v30(root: Path, episodes: list[dict]) -> None:
    write_dataset(root, episodes, fps=FPS, features=FEATURES, robot_type="test")


def write_v21(root: Path, episodes: list[dict]) -> None:
    """The older layout, as lerobot 0.3 writes it: one file an episode, metadata in JSON lines."""
    (root / "meta").mkdir(parents=True)
    tasks = list(dict.fromkeys(TASKS))
    meta: dict[str, list[dict]] = {
        "tasks": [{"task_index": i, "task": task} for i, task in enumerate(tasks)],
        "episodes": [],
    }
    start = 0
    for number, episode in enumerate(episodes):
        length = len(episode["action"])
        meta["episodes"].append(
            {"episode_index": number, "tasks": [episode["task"]], "length": length}
        )
        write_v21_data(root, number, start, tasks.index(episode["task"]), episode)
        path = root / f"videos/chunk-{number // 2:03d}/{VIDEO}/episode_{number:06d}.mp4"
        video = VideoWriter(path, fps=FPS, height=48, width=64, encoding=Encoding())
        for image in episode[VIDEO]:
            video.add(image)
        video.close()
        start += length
    for name, rows in meta.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (root / "meta" / f"{name}.jsonl").write_text(lines)
    features = {k: {"dtype": f.dtype, "shape": f.shape} for k, f in FEATURES.items()}
    features[VIDEO]["shape"] = (3, 48, 64)  # some declare their images channels first
    for key in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        dtype = "float32" if key == "timestamp" else "int64"
        features[key] = {"dtype": dtype, "shape": (1,), "names": None}
    info = {
        "codebase_version": "v2.1",
        "total_episodes": len(episodes),
        "total_frames": start,
        "total_tasks": len(tasks),
        "chunks_size": 2,
        "fps": FPS,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/"
        "episode_{episode_index:06d}.mp4",
        "features": features,
    }
    (root / "meta" / "info.json").write_text(json.dumps(info))


def to_png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def write_v21_data(root: Path, number: int, start: int, task: int, episode: dict) -> None:
    length = len(episode["action"])
    images = [{"bytes": to_png(image), "path": "frame.png"} for image in episode[IMAGE]]
    table = pa.table(
        {
            "observation.state": pa.array(list(episode["observation.state"])),  # variable length
            "action": pa.array(list(episode["action"]), pa.list_(pa.float64(), 3)),
            "reward": episode["reward"],
            "note": episode["note"],
            IMAGE: images,
            "timestamp": (np.arange(length) / FPS).astype(np.float32),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, number),
            "index": np.arange(length) + start,
            "task_index": np.full(length, task),
        }
    )
    path = root / f"data/chunk-{number // 2:03d}/episode_{number:06d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=3)


@pytest.fixture(scope="module")
def roots(tmp_path_factory, episodes) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("datasets")
    write_v21(folder / "v2.1", episodes)
    write_v30(folder / "v3.0", episodes)
    return {name: folder / name for name in ("v2.1", "v3.0")}


@pytest.fixture(params=["v2.1", "v3.0"])
def version(request) -> str:
    return request.param


@pytest.fixture
def copy(roots, version, tmp_path) -> Path:
    """A dataset to damage."""
    return shutil.copytree(roots[version], tmp_path / "copy")


def video_error(images: np.ndarray, expected: np.ndarray) -> float:
    """The worst frame's mean absolute difference."""
    return np.abs(images.astype(float) - expected).mean(axis=(-3, -2, -1)).max()


def test_metadata(roots, version):
    dataset = LeRobotDataset(roots[version])
    assert dataset.version == version
    assert dataset.fps == FPS
    assert dataset.cameras == (VIDEO, IMAGE)
    assert dataset.tasks == {0: "pick up the cup", 1: "open the drawer"}
    assert [(e.start, e.stop) for e in dataset.episodes] == [(0, 7), (7, 11), (11, 16)]
    assert [e.tasks for e in dataset.episodes] == [(task,) for task in TASKS]
    assert len(dataset) == 16
    assert {key: (f.dtype, f.shape) for key, f in dataset.features.items()} == {
        **{key: (f.dtype, f.shape) for key, f in FEATURES.items()},
        "timestamp": ("float32", (1,)),
        "frame_index": ("int64", (1,)),
        "episode_index": ("int64", (1,)),
        "index": ("int64", (1,)),
        "task_index": ("int64", (1,)),
    }


def test_episodes_are_read_as_written(roots, version, episodes):
    dataset = LeRobotDataset(roots[version])
    for number, episode in enumerate(episodes):
        read = dataset.episode(number, cameras=dataset.cameras)
        for key in FEATURES.keys() - {VIDEO}:
            np.testing.assert_array_equal(read[key], episode[key], err_msg=key)
        assert read["action"].dtype == np.float64
        assert video_error(read[VIDEO], episode[VIDEO]) < tolerance("video codec", "uint8")
        assert read["task"] == [TASKS[number]] * LENGTHS[number]
        time = np.arange(LENGTHS[number]) / FPS
        np.testing.assert_array_equal(read["timestamp"], time.astype(np.float32))


def test_a_frame_is_its_row_of_the_episode(roots, version):
    dataset = LeRobotDataset(roots[version])
    index = 0
    for number, length in enumerate(LENGTHS):
        episode = dataset.episode(number, cameras=dataset.cameras)
        for t in range(length):
            frame = dataset[index]
            assert frame.keys() == episode.keys()
            for key in frame.keys() - {"task"}:
                np.testing.assert_array_equal(frame[key], episode[key][t], err_msg=key)
            assert frame["task"] == episode["task"][t]
            assert (int(frame["index"]), int(frame["frame_index"])) == (index, t)
            index += 1


def test_frames_have_the_declared_shapes_and_are_the_callers_own(roots, version):
    dataset = LeRobotDataset(roots[version])
    frame = dataset[-1]
    assert frame[VIDEO].shape == (48, 64, 3)
    assert frame[VIDEO].dtype == np.uint8
    assert frame["reward"].shape == ()
    frame["action"][:] = 0.0
    dataset.episode(2)["action"][:] = 0.0
    assert np.abs(dataset[-1]["action"]).min() > 0.0


def test_datasets_can_be_sent_to_workers(roots, version):
    dataset = LeRobotDataset(roots[version])
    other = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(other[8][VIDEO], dataset[8][VIDEO])
    np.testing.assert_array_equal(other[8][IMAGE], dataset[8][IMAGE])


def test_out_of_range(roots):
    dataset = LeRobotDataset(roots["v3.0"])
    with pytest.raises(IndexError):
        dataset[16]
    with pytest.raises(IndexError):
        dataset.episode(3)
    with pytest.raises(ValueError, match=r"cameras: expected some of .*, got \['top'\]"):
        dataset.episode(0, cameras=["top"])


@pytest.mark.parametrize("codec", ["libsvtav1", "libx264"])
def test_random_access_to_frames_far_from_a_key_frame(tmp_path, codec):
    episode = make_episode(np.random.default_rng(1), "look", 9)
    features = {VIDEO: FEATURES[VIDEO]}
    write_dataset(
        tmp_path / "data",
        [{"task": "look", VIDEO: episode[VIDEO]}] * 3,
        fps=FPS,
        features=features,
        encoding=Encoding(codec=codec, gop=25, crf=20),
    )
    dataset = LeRobotDataset(tmp_path / "data")
    for index in (26, 0, 17, 9, 8, 25):
        image = dataset[index][VIDEO]
        errors = [video_error(image, expected) for expected in episode[VIDEO]]
        assert np.argmin(errors) == index % 9
        assert errors[index % 9] < tolerance("video codec", "uint8")


def test_v30_layout(roots):
    """The files, and of them what lerobot depends on."""
    root = roots["v3.0"]
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert files == {
        "meta/info.json",
        "meta/stats.json",
        "meta/tasks.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        "data/chunk-000/file-000.parquet",
        f"videos/{VIDEO}/chunk-000/file-000.mp4",
    }
    info = json.loads((root / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0"
    assert info["splits"] == {"train": "0:3"}
    assert info["data_path"] == "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    assert info["features"][VIDEO]["info"]["video.codec"] == "av1"
    tasks = pq.read_table(root / "meta/tasks.parquet")
    assert tasks.to_pydict() == {"task_index": [0, 1], "__index_level_0__": list(TASKS[:2])}
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["__index_level_0__"]
    schema = pq.read_schema(root / "data/chunk-000/file-000.parquet")
    assert schema.field("observation.state").type == pa.list_(pa.float32(), 5)
    described = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert described[IMAGE] == {"_type": "Image"}
    assert described["action"] == {
        "feature": {"dtype": "float64", "_type": "Value"},
        "length": 3,
        "_type": "Sequence",
    }
    second = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()[1]
    assert {key: value for key, value in second.items() if not key.startswith("stats/")} == {
        "episode_index": 1,
        "tasks": ["open the drawer"],
        "length": 4,
        "dataset_from_index": 7,
        "dataset_to_index": 11,
        "data/chunk_index": 0,
        "data/file_index": 0,
        f"videos/{VIDEO}/chunk_index": 0,
        f"videos/{VIDEO}/file_index": 0,
        f"videos/{VIDEO}/from_timestamp": 0.7,
        f"videos/{VIDEO}/to_timestamp": 1.1,
        "meta/episodes/chunk_index": 0,
        "meta/episodes/file_index": 0,
    }


def test_statistics_are_those_of_all_frames(roots, episodes):
    stats = json.loads((roots["v3.0"] / "meta/stats.json").read_text())
    actions = np.concatenate([episode["action"] for episode in episodes])
    np.testing.assert_allclose(
        stats["action"]["mean"], actions.mean(axis=0), rtol=tolerance("statistics", "float64")
    )
    np.testing.assert_allclose(
        stats["action"]["std"], actions.std(axis=0), rtol=tolerance("statistics", "float64")
    )
    np.testing.assert_allclose(
        stats["action"]["q99"],
        np.quantile(actions, 0.99, axis=0),
        rtol=tolerance("statistics", "float64"),
    )
    assert stats["action"]["count"] == [16]
    assert "note" not in stats
    pixels = np.concatenate([episode[IMAGE] for episode in episodes]).reshape(-1, 3) / 255.0
    for name, expected in (
        ("min", pixels.min(axis=0)),
        ("max", pixels.max(axis=0)),
        ("mean", pixels.mean(axis=0)),
        ("std", pixels.std(axis=0)),
        ("q10", np.quantile(pixels, 0.10, axis=0, method="inverted_cdf")),
    ):
        np.testing.assert_allclose(
            stats[IMAGE][name],
            expected.reshape(3, 1, 1),
            rtol=tolerance("statistics", "float64"),
            err_msg=name,
        )
    first = pq.read_table(roots["v3.0"] / "meta/episodes/chunk-000/file-000.parquet").to_pylist()[0]
    assert first["stats/action/max"] == episodes[0]["action"].max(axis=0).tolist()


def test_full_files_are_followed_by_new_ones(tmp_path, episodes, monkeypatch):
    monkeypatch.setattr(lerobot_writer, "DATA_FILE_MB", 0)
    monkeypatch.setattr(lerobot_writer, "FILES_PER_CHUNK", 2)
    write_v30(tmp_path / "many", episodes)
    paths = sorted(p.relative_to(tmp_path / "many/data") for p in tmp_path.rglob("data/*/*"))
    assert list(map(str, paths)) == [
        "chunk-000/file-000.parquet",
        "chunk-000/file-001.parquet",
        "chunk-001/file-000.parquet",
    ]
    dataset = LeRobotDataset(tmp_path / "many")
    for number, episode in enumerate(episodes):
        read = dataset.episode(number, cameras=[VIDEO, IMAGE])
        np.testing.assert_array_equal(read["action"], episode["action"])
        np.testing.assert_array_equal(read[IMAGE], episode[IMAGE])
        assert video_error(read[VIDEO], episode[VIDEO]) < tolerance("video codec", "uint8")


def test_writing_refuses_what_is_there(tmp_path, episodes):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there"):
        write_v30(tmp_path / "there", episodes)


def test_writing_that_fails_leaves_nothing(tmp_path, episodes):
    def broken():
        yield episodes[0]
        raise OSError("the robot fell over")

    with pytest.raises(OSError, match="fell over"):
        write_v30(tmp_path / "new", broken())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": np.zeros((7, 4))}, r"expected action of shape \['T', 3\], got \['T', 4\]"),
        ({"action": np.zeros((6, 3))}, r"as many frames of each feature, got .*'action': 6"),
        ({VIDEO: np.zeros((7, 48, 64, 3))}, "of dtype uint8, got float64"),
        ({"reward": np.zeros(7, complex)}, "expected reward of dtype float32, got complex128"),
        ({"speed": np.zeros(7)}, "expected .* got .*'speed'"),
    ],
)
def test_writing_refuses_episodes_unlike_the_features(tmp_path, episodes, change, message):
    with pytest.raises(ValueError, match=f"episode 0: .*{message}"):
        write_v30(tmp_path / "new", [episodes[0] | change])
    assert list(tmp_path.iterdir()) == []


def test_writing_refuses_no_episodes_and_odd_videos(tmp_path, episodes):
    with pytest.raises(ValueError, match="expected at least one, got none"):
        write_v30(tmp_path / "new", [])
    features = {VIDEO: Feature("video", (47, 64, 3))}
    episode = {"task": "x", VIDEO: episodes[0][VIDEO][:, :47]}
    with pytest.raises(ValueError, match="even height and width, got 47x64"):
        write_dataset(tmp_path / "new", [episode], fps=FPS, features=features)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_dataset(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing: expected the folder"):
        LeRobotDataset(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"info\.json: expected"):
        LeRobotDataset(tmp_path)


@pytest.mark.parametrize(
    "pattern", ["meta/info.json", "meta/tasks.*", "meta/episodes*", "data/*/*", "videos/*/*/*"]
)
def test_missing_files_are_named(copy, pattern):
    paths = sorted(copy.glob(pattern))
    if paths[0].is_dir():
        paths = sorted(paths[0].glob("*/*"))
    for path in paths:
        path.unlink()
    expected = paths[0].name if "episodes" not in str(paths[0].parent) else "episodes"
    with pytest.raises(FileNotFoundError, match=expected):
        LeRobotDataset(copy)


@pytest.mark.parametrize("pattern", ["meta/info.json", "meta/tasks.*", "data/*/*"])
def test_damaged_files_are_named(copy, pattern):
    path = sorted(copy.glob(pattern))[0]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=f"{path.name}.*: expected"):
        LeRobotDataset(copy)


@pytest.mark.parametrize("has_checksums", [True, False])
@pytest.mark.parametrize("written", [b"\x11" * 24, b"\x00" * 24])
def test_numbers_that_were_written_over_are_noticed(copy, written, has_checksums):
    """By checksums, in files that we write; else by the file's own extremes."""
    path = sorted(copy.glob("data/*/*"))[0]
    table = pq.read_table(path)
    if not has_checksums:
        pq.write_table(table, path, compression="none", use_dictionary=False)
    actions = np.stack(table["action"].to_numpy())
    largest = actions[np.abs(actions).max(axis=1).argmax()]
    data = path.read_bytes()
    if has_checksums:
        place = pq.read_metadata(path).row_group(0).column(1).data_page_offset + 60
    else:
        place = data.index(largest.tobytes())
    path.write_bytes(data[:place] + written + data[place + len(written) :])
    with pytest.raises(ValueError, match=rf"{path.name}: expected (a parquet|action from) "):
        LeRobotDataset(copy)


def test_damaged_videos_are_named_when_read(copy):
    path = sorted(copy.glob("videos/*/*/*"))[0]
    path.write_bytes(b"no video at all" * 100)
    dataset = LeRobotDataset(copy)
    with pytest.raises(ValueError, match=f"{path.name}: expected a video"):
        dataset[0]


@pytest.mark.parametrize("gop", [2, 25])
def test_frames_that_the_decoder_made_up_are_no_frames(tmp_path, gop):
    """FFmpeg's decoder of H.264 conceals what it cannot read, and says so only beside the frame."""
    generator = np.random.default_rng(0)
    path, encoding = tmp_path / "video.mp4", Encoding(codec="libx264", gop=gop)
    video = VideoWriter(path, fps=FPS, height=96, width=128, encoding=encoding)
    image = generator.integers(0, 256, (12, 16, 3), np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    for shift in range(20):
        video.add(np.roll(image, 3 * shift, axis=1))
    video.close()
    whole, said = path.read_bytes(), []
    for _ in range(10):
        place = generator.integers(len(whole) // 4, len(whole) // 2)
        path.write_bytes(whole[:place] + generator.bytes(64) + whole[place + 64 :])
        try:
            read_frames(path, start=0.0, count=20, fps=FPS)
        except ValueError as error:
            said.append(str(error))
    assert len(said) > 5  # some damage is read as another picture
    assert all(f"{path}: expected a " in each for each in said)
    assert any("found it damaged" in each for each in said)


def test_damaged_images_are_named_when_read(tmp_path, episodes):
    write_v30(tmp_path / "data", episodes)
    path = next((tmp_path / "data").glob("data/*/*"))
    table = pq.read_table(path)
    images = [{"bytes": b"no image", "path": None}] * len(table)
    table = table.set_column(table.schema.get_field_index(IMAGE), IMAGE, pa.array(images))
    pq.write_table(table, path)
    with pytest.raises(ValueError, match=f"{path.name}: expected an image in row 3 of {IMAGE}"):
        LeRobotDataset(tmp_path / "data")[3]


def change_info(root: Path, **changes) -> None:
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebase_version": "v2.0"}, "expected codebase_version v2.1 or v3.0, got v2.0"),
        ({"codebase_version": None}, "expected codebase_version, of type str, got None"),
        ({"fps": 0}, "expected fps above 0, got 0"),
        ({"total_frames": 17}, "expected total_frames 16, as its episodes have, got 17"),
        ({"data_path": "data/{number}"}, "expected data_path of .*, got 'number'"),
        ({"features": {}}, "expected the features .*'timestamp'.*, got "),
    ],
)
def test_wrong_info(copy, changes, message):
    change_info(copy, **changes)
    with pytest.raises(ValueError, match=f"info.json: {message}"):
        LeRobotDataset(copy)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("action", {"shape": [4]}, r"action: expected \[\d+, 4\] without nulls, got \d+ numbers"),
        ("reward", {"dtype": "int64"}, "reward: expected int64, got float"),
        ("missing", {"dtype": "int64", "shape": [1]}, r"expected the columns \['missing'\], got"),
        (IMAGE, {"shape": [40, 56]}, r"of shape \[H, W, 3\], got \[40, 56\]"),
    ],
)
def test_features_unlike_the_data(copy, key, change, message):
    features = json.loads((copy / "meta/info.json").read_text())["features"]
    features[key] = features.get(key, {}) | change
    change_info(copy, features=features)
    with pytest.raises(ValueError, match=message):
        LeRobotDataset(copy)


@pytest.mark.parametrize("camera", [VIDEO, IMAGE])
def test_images_of_another_size(copy, camera):
    features = json.loads((copy / "meta/info.json").read_text())["features"]
    features[camera]["shape"] = [64, 64, 3]
    change_info(copy, features=features)
    with pytest.raises(ValueError, match=rf"expected {camera} of \[64, 64, 3\], got"):
        LeRobotDataset(copy)[0]


def test_rows_in_another_order(copy):
    path = sorted(copy.glob("data/*/*"))[0]
    table = pq.read_table(path)
    pq.write_table(table.take([1, 0, *range(2, len(table))]), path)
    with pytest.raises(ValueError, match=f"{path.name}: expected index 0 in row 0, got 1"):
        LeRobotDataset(copy)


def test_rows_of_an_unknown_task(copy):
    path = sorted(copy.glob("data/*/*"))[0]
    table = pq.read_table(path)
    position = table.schema.get_field_index("task_index")
    table = table.set_column(position, "task_index", pa.array(np.full(len(table), 7)))
    pq.write_table(table, path)
    with pytest.raises(ValueError, match=f"{path.name}: .*one of 2 tasks in row 0, got 7"):
        LeRobotDataset(copy)


def test_a_video_that_ends_early(copy, episodes):
    path = sorted(copy.glob("videos/*/*/*"))[0]
    video = VideoWriter(path, fps=FPS, height=48, width=64, encoding=Encoding())
    for image in episodes[0][VIDEO][:4]:
        video.add(image)
    video.close()
    dataset = LeRobotDataset(copy)
    assert video_error(dataset[3][VIDEO], episodes[0][VIDEO][3]) < tolerance("video codec", "uint8")
    with pytest.raises(ValueError, match=f"{path.name}: expected 1 frames from 0.5000 s, found 0"):
        dataset[5]
    with pytest.raises(ValueError, match=f"{path.name}: expected 7 frames from 0.0000 s, found 4"):
        dataset.episode(0, cameras=[VIDEO])


def test_the_shipped_episode():
    dataset = LeRobotDataset(DEMO_EPISODE)
    assert (len(dataset), dataset.fps, len(dataset.episodes)) == (200, 25, 1)
    assert dataset.tasks == {0: "transfer the red cube from the right arm to the left arm"}
    prefix = "observation.images."
    names = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    assert dataset.cameras == tuple(prefix + name for name in names)
    first, last = dataset[0], dataset[199]
    assert first["observation.state"].shape == first["action"].shape == (14,)
    assert all(first[camera].shape == (224, 224, 3) for camera in dataset.cameras)

    def red(image: np.ndarray) -> int:
        return int((image[..., 0].astype(int) - image[..., 1:].max(axis=-1) > 100).sum())

    top, left, right = dataset.cameras
    assert 20 < red(first[top]) < 400  # the cube on the table, seen from above
    assert red(first[left]) == 0
    assert red(last[left]) > 2000  # at last in the left gripper
    assert red(last[right]) == 0
    size = sum(path.stat().st_size for path in DEMO_EPISODE.rglob("*") if path.is_file())
    assert size < 700_000


def test_no_backend_is_imported():
    code = (
        "import sys, pruner_run.data.lerobot, pruner_run.data.lerobot_writer, pruner_run.tokenizer,"
        "pruner_run.record, pruner_run.evaluate;"
        "assert not {'jax', 'torch', 'mujoco', 'dm_control', 'gym_aloha'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_row_groups_of_images_are_kept_up_to_a_number_of_bytes(roots, version, monkeypatch):
    dataset = LeRobotDataset(roots[version])
    expected = [dataset[index][IMAGE] for index in range(len(dataset))]
    read, groups = lerobot_table._read_row_group, []

    def counted(path, metadata, column, group):
        groups.append((path, group))
        return read(path, metadata, column, group)

    monkeypatch.setattr(lerobot_table, "_read_row_group", counted)
    for limit, again in ((1 << 20, False), (0, True)):
        monkeypatch.setattr(lerobot_table, "recent", lerobot_table.Recent(limit))
        groups.clear()
        for index in (*range(16), *reversed(range(16))):
            np.testing.assert_array_equal(dataset[index][IMAGE], expected[index])
        assert (len(groups) > len(set(groups))) == again
        assert len(groups) < 16
