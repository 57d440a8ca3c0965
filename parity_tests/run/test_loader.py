"""Batches from datasets of both versions, with images of both kinds, in order, whole or shared."""

import dataclasses
import json
import shutil
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from parity_tests.run.test_lerobot import (
    IMAGE,
    LENGTHS,
    TASKS,
    VIDEO,
    make_episode,
    write_v21,
    write_v30,
)
from pruner_run.assets import DEMO_TOKENIZER
from pruner_run.data.config import DataConfig
from pruner_run.data.images import resize_with_pad
from pruner_run.data.lerobot import LeRobotDataset
from pruner_run.data.loader import TrainingData
from pruner_run.data.normalization import EPSILON, FeatureStats, NormStats
from pruner_run.data.sampling import positions
from pruner_run.tokenizer import PromptTokenizer
from pruner_spec.config import CAMERAS, Pi0Config
from pruner_spec.training import Batch

MODEL = Pi0Config(
    paligemma_variant="tiny",
    action_expert_variant="tiny_expert",
    vision_variant="tiny/56",
    action_horizon=3,
    action_dim=7,
    max_token_len=40,
    pi05=True,
)
TOKENIZER = PromptTokenizer(DEMO_TOKENIZER, max_len=MODEL.max_token_len)
REPACK = {
    f"image/{CAMERAS[0]}": VIDEO,
    f"image/{CAMERAS[1]}": IMAGE,
    "state": "observation.state",
    "actions": "action",
}
LOW, HIGH = -2.0, 3.0
STATS = NormStats(
    **{
        key: FeatureStats(
            mean=np.zeros(length),
            std=np.ones(length),
            q01=np.full(length, LOW),
            q99=np.full(length, HIGH),
        )
        for key, length in (("state", 5), ("actions", 3))
    }
)


@pytest.fixture(scope="module")
def episodes() -> list[dict]:
    rng = np.random.default_rng(0)
    return [make_episode(rng, *task) for task in zip(TASKS, LENGTHS, strict=True)]


@pytest.fixture(scope="module")
def roots(tmp_path_factory, episodes) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("datasets")
    write_v21(folder / "v2.1", episodes)
    write_v30(folder / "v3.0", episodes)
    return {name: folder / name for name in ("v2.1", "v3.0")}


@pytest.fixture(params=["v2.1", "v3.0"])
def root(request, roots) -> Path:
    return roots[request.param]


@pytest.fixture
def copy(root, tmp_path) -> Path:
    """A dataset to damage."""
    return shutil.copytree(root, tmp_path / "copy")


def config(root: Path, **options) -> DataConfig:
    given = {"repo_id": str(root), "repack": REPACK, "prompt_from_task": True}
    return DataConfig(**(given | options))


def load(data: DataConfig, *, stats: NormStats = STATS, model=MODEL, **options) -> TrainingData:
    given = {"seed": 0, "batch_size": 4, "workers": 0}
    return TrainingData(data, model, stats, TOKENIZER, **(given | options))


def take(data: TrainingData, count: int) -> list[Batch]:
    with data:
        return [next(data) for _ in range(count)]


def flat(batch: Batch) -> dict[str, np.ndarray]:
    arrays = dict(vars(batch))
    for key in ("images", "image_masks"):
        arrays |= {f"{key}/{camera}": array for camera, array in arrays.pop(key).items()}
    return arrays


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    for one, other in zip(found, expected, strict=True):
        for key, array in flat(one).items():
            assert array.dtype == flat(other)[key].dtype
            np.testing.assert_array_equal(array, flat(other)[key], err_msg=key)


def test_batches_are_the_datasets_frames(root, episodes):
    dataset = LeRobotDataset(root)
    frames = [(e, t) for e, length in enumerate(LENGTHS) for t in range(length)]
    (batch,) = take(load(config(root), batch_size=16), 1)
    assert {key: (str(a.dtype), a.shape) for key, a in flat(batch).items()} == {
        **{f"images/{camera}": ("uint8", (16, 224, 224, 3)) for camera in CAMERAS},
        **{f"image_masks/{camera}": ("bool", (16,)) for camera in CAMERAS},
        "state": ("float32", (16, 7)),
        "tokenized_prompt": ("int32", (16, 40)),
        "tokenized_prompt_mask": ("bool", (16, 40)),
        "actions": ("float32", (16, 3, 7)),
        "places": ("int64", (16,)),
    }
    assert batch.places.tolist() == list(range(16))
    assert [batch.image_masks[camera].all() for camera in CAMERAS] == [True, True, False]
    assert not batch.images[CAMERAS[2]].any()
    scale = HIGH - LOW + EPSILON
    for row, index in enumerate(positions(0, 16, 16, 0)):
        number, t = frames[index]
        episode = episodes[number]
        state = (episode["observation.state"][t].astype(np.float64) - LOW) / scale * 2 - 1
        np.testing.assert_array_equal(batch.state[row, :5], state.astype(np.float32))
        assert not batch.state[row, 5:].any()
        following = [min(t + step, LENGTHS[number] - 1) for step in range(3)]
        actions = (episode["action"][following] - LOW) / scale * 2 - 1
        np.testing.assert_array_equal(batch.actions[row, :, :3], actions.astype(np.float32))
        assert not batch.actions[row, :, 3:].any()
        tokens, mask = TOKENIZER.tokenize(TASKS[number], state)
        assert batch.tokenized_prompt[row].tolist() == tokens.tolist()
        assert batch.tokenized_prompt_mask[row].tolist() == mask.tolist()
        np.testing.assert_array_equal(
            batch.images[CAMERAS[1]][row], resize_with_pad(episode[IMAGE][t])
        )
        np.testing.assert_array_equal(
            batch.images[CAMERAS[0]][row], resize_with_pad(dataset[index][VIDEO])
        )


def test_versions_hold_the_same(roots):
    """But for the videos, which are not compressed together."""
    kept = {key: source for key, source in REPACK.items() if source != VIDEO}
    v21, v30 = (take(load(config(roots[name], repack=kept)), 5) for name in ("v2.1", "v3.0"))
    assert_same(v21, v30)


def test_workers_change_nothing(roots):
    alone = take(load(config(roots["v3.0"])), 6)
    assert_same(take(load(config(roots["v3.0"]), workers=3), 6), alone)
    assert_same(take(load(config(roots["v3.0"]), workers=1, cache_bytes=0), 6), alone)


@pytest.mark.parametrize("batch_size", [4, 24])  # more than the dataset has, too
def test_a_resumed_run_goes_on_with_the_next_sample(roots, batch_size):
    whole = take(load(config(roots["v3.0"]), batch_size=batch_size), 6)
    rest = load(config(roots["v3.0"]), batch_size=batch_size, start_step=4, workers=2)
    assert_same(take(rest, 2), whole[4:])
    assert rest.step == 6


def test_shares_make_up_the_batch(roots):
    whole = take(load(config(roots["v3.0"])), 3)
    parts = [
        take(load(config(roots["v3.0"]), process_index=process, process_count=2), 3)
        for process in range(2)
    ]
    for step, batch in enumerate(whole):
        for key, array in flat(batch).items():
            joined = np.concatenate([flat(part[step])[key] for part in parts])
            np.testing.assert_array_equal(joined, array, err_msg=key)
    assert parts[1][0].places.tolist() == [2, 3]


def test_relative_actions(roots):
    plain, relative = (
        take(load(config(roots["v3.0"], delta_action_mask=mask)), 1)[0]
        for mask in (None, (True, False))
    )
    difference = (plain.actions - relative.actions)[..., 0]
    assert (difference == difference[:, :1]).sum() > 0
    np.testing.assert_array_equal(plain.actions[..., 1:], relative.actions[..., 1:])
    assert (difference != 0).any()


def test_threads_end(roots):
    before = threading.active_count()
    data = load(config(roots["v3.0"]), workers=3)
    next(data)
    assert threading.active_count() > before
    data.close()
    assert threading.active_count() == before
    data.close()


def test_generated_data():
    fake = DataConfig(fake=True)
    data = TrainingData(fake, MODEL, None, None, seed=0, batch_size=8, workers=2)
    assert len(data) == 1024
    (batch,) = take(data, 1)
    again = TrainingData(fake, MODEL, None, None, seed=0, batch_size=8, workers=0)
    assert_same(take(again, 1), [batch])
    assert all(mask.all() for mask in batch.image_masks.values())
    assert np.abs(batch.state).max() <= 1
    assert np.abs(batch.actions).max() <= 1
    lengths = batch.tokenized_prompt_mask.sum(axis=1)
    assert len(set(lengths.tolist())) > 1
    assert lengths.min() >= 1
    assert (batch.tokenized_prompt < MODEL.paligemma.vocab_size).all()
    assert (batch.tokenized_prompt[~batch.tokenized_prompt_mask] == 0).all()
    image = batch.images[CAMERAS[0]][0]
    assert (image[:14, :14] == image[0, 0]).all()
    # Pinned: the sample's numbers are those of the stream, whatever the seed of the run.
    other = TrainingData(fake, MODEL, None, None, seed=1, batch_size=1024, workers=0)
    index = int(positions(0, 8, 1024, 0)[0])
    np.testing.assert_array_equal(other._inputs[index]["state"], batch.state[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_video_is_named(copy, workers):
    path = sorted(copy.glob("videos/*/*/*"))[0]
    data = load(config(copy), workers=workers, batch_size=16)
    path.write_bytes(b"no video at all" * 100)
    threads = threading.active_count()
    with pytest.raises(ValueError, match=rf"frame \d+ of episode \d: .*{path.name}: expected a"):
        next(data)
    assert threading.active_count() == threads


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named(copy, workers):
    path = sorted(copy.glob("data/*/*"))[0]
    table = pq.read_table(path)
    images = table[IMAGE].to_pylist()
    images[1] = {"bytes": b"no image", "path": None}
    table = table.set_column(table.schema.get_field_index(IMAGE), IMAGE, pa.array(images))
    pq.write_table(table, path)
    message = rf"frame 1 of episode 0: .*{path.name}: expected an image in row 1 of {IMAGE}"
    with pytest.raises(ValueError, match=message):
        take(load(config(copy), workers=workers, batch_size=16), 1)


def test_a_damaged_table_is_named(copy):
    path = sorted(copy.glob("data/*/*"))[0]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=f"{path.name}: expected a parquet file, got a damaged"):
        load(config(copy))


@pytest.mark.parametrize("key", ["observation.state", "action"])
def test_numbers_that_are_none_are_named(copy, key):
    path = sorted(copy.glob("data/*/*"))[0]
    table = pq.read_table(path)
    rows = table[key].to_pylist()
    rows[2][1] = np.nan
    place, kind = table.schema.get_field_index(key), table.schema.field(key).type
    pq.write_table(table.set_column(place, table.schema.field(key), pa.array(rows, kind)), path)
    with pytest.raises(ValueError, match=f"frame 2 of episode 0: expected finite '{key}', got nan"):
        load(config(copy))


def test_errors_that_are_no_users_come_through(roots, monkeypatch):
    data = load(config(roots["v3.0"]), workers=2)
    monkeypatch.setattr(type(data._inputs), "__getitem__", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repack": None}, "expected the feature 'observation.images.right_wrist_0_rgb' for"),
        ({"repack": REPACK | {"state": "speed"}}, "expected the feature 'speed' for 'state', got"),
        ({"repack": REPACK | {"prompt": "order"}}, "expected the feature 'order' for 'prompt'"),
        ({"repack": REPACK | {"state": VIDEO}}, f"expected '{VIDEO}' to be a vector, got"),
        (
            {"repack": REPACK | {f"image/{CAMERAS[2]}": "reward"}},
            "expected 'reward' to be a camera's, got",
        ),
        ({"repack": REPACK | {"image/top": IMAGE}}, r"repack: .* got also \['image/top'\]"),
        ({"repack": {"actions": "action"}}, r"repack: expected 'state' among its keys, got"),
        (
            {"repack": {"state": "reward", "actions": "action"}},
            "frame 0 of episode 0: images: expected .*base_0_rgb",
        ),
        ({"robot": "libero"}, "repack: expected keys of .*'observation/state'.*, got also"),
        ({"delta_action_mask": (True,) * 4}, "delta_action_mask: expected .* got 5 and 3"),
        ({"prompt_from_task": False}, "prompt: expected an instruction"),
    ],
)
def test_datasets_that_do_not_fit(roots, options, message):
    with pytest.raises(ValueError, match=message):
        load(config(roots["v3.0"], **options))


def test_models_and_statistics_that_do_not_fit(roots):
    data = config(roots["v3.0"])
    small = dataclasses.replace(MODEL, action_dim=4)
    with pytest.raises(ValueError, match="state: expected at most action_dim=4 numbers, got 5"):
        load(data, model=small)
    short = dataclasses.replace(STATS, actions=FeatureStats(**vars(STATS.actions)))
    swapped = NormStats(state=short.actions, actions=short.state)
    with pytest.raises(ValueError, match="state: statistics: expected those of 5 numbers or more"):
        load(data, stats=swapped)
    with pytest.raises(ValueError, match="norm_stats, tokenizer: expected both for a dataset"):
        TrainingData(data, MODEL, None, TOKENIZER, seed=0, batch_size=4)
    with pytest.raises(ValueError, match="workers: expected 0 or more, got -1"):
        load(data, workers=-1)


def test_the_prompt_of_a_column(roots):
    """Any text of the dataset can be the instruction, its own task among them."""
    for source, first in (("note", "frame "), ("task", "pick up")):
        data = config(
            roots["v3.0"], repack=REPACK | {"prompt": source}, prompt_from_task=source == "task"
        )
        (batch,) = take(load(data, batch_size=16), 1)
        expected, _ = TOKENIZER.tokenize(first.strip(), batch.state[0, :5])
        assert batch.tokenized_prompt[0, :3].tolist() == expected[:3].tolist()


def test_scalars_are_vectors_of_one(roots):
    data = config(roots["v3.0"], repack=REPACK | {"state": "reward", "actions": "reward"})
    (batch,) = take(load(data), 1)
    np.testing.assert_array_equal(batch.state[:, 0], batch.actions[:, 0, 0])


def test_a_missing_dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="expected the folder of a LeRobot dataset"):
        load(config(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="repo_id: expected a dataset's folder or its name"):
        load(DataConfig())
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = "expected owner/name to be .*found neither. to get it from the Hub: pip install"
    with pytest.raises(FileNotFoundError, match=message):
        load(config(Path("owner/name")))


def test_datasets_by_name(roots, tmp_path, monkeypatch):
    home, calls = tmp_path / "home", []
    monkeypatch.setenv("HF_LEROBOT_HOME", str(home))
    hub = types.ModuleType("huggingface_hub")
    hub.__spec__ = types.SimpleNamespace(name="huggingface_hub")  # type: ignore[assignment]

    def download(repo_id: str, repo_type: str) -> str:
        calls.append((repo_id, repo_type))
        if repo_id == "owner/lost":
            raise ConnectionError("no network")
        return str(roots["v3.0"])

    hub.snapshot_download = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert len(load(config(Path("owner/name")))) == 16
    assert calls == [("owner/name", "dataset")]
    with pytest.raises(FileNotFoundError, match=r"the download failed \(no network\)\. to get it"):
        load(config(Path("owner/lost")))
    calls.clear()
    shutil.copytree(roots["v2.1"], home / "owner/name")
    assert len(load(config(Path("owner/name")))) == 16
    assert calls == []


def test_an_empty_dataset(roots, tmp_path):
    copy = shutil.copytree(roots["v2.1"], tmp_path / "copy")
    path = copy / "meta" / "info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"total_episodes": 0, "total_frames": 0}))
    (copy / "meta" / "episodes.jsonl").write_text("")
    with pytest.raises(ValueError, match="expected frames, got none"):
        load(config(copy))
