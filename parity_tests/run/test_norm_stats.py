"""Statistics of datasets: NumPy's, from blocks, in the place and the format that openpi has."""

import dataclasses
import shlex
import types
from pathlib import Path

import numpy as np
import pytest

from parity_tests.run.test_lerobot import FPS
from parity_tests.tolerances import tolerance
from pruner_run import cli, compute_norm_stats, configs
from pruner_run.compute_norm_stats import Options
from pruner_run.data import norm_stats
from pruner_run.data.config import DataConfig
from pruner_run.data.lerobot_features import Feature
from pruner_run.data.lerobot_writer import write_dataset
from pruner_run.data.norm_stats import (
    Moments,
    checkpoint_assets,
    dataset_norm_stats,
    feature_stats,
    require_norm_stats,
)
from pruner_run.data.normalization import FeatureStats, NormStats
from pruner_run.data.robots import aloha_actions_to_pi, aloha_state_to_pi
from pruner_spec.config import Pi0Config

EXACT = tolerance("statistics", "float64")
LENGTHS = (30, 2, 25)
HORIZON = 4


def assert_stats(found: FeatureStats, values: np.ndarray) -> None:
    """`values` [n, A]; quantiles are of float32 numbers."""
    quantiles = np.quantile(values.astype(np.float32).astype(np.float64), [0.01, 0.99], axis=0)
    expected = [values.mean(axis=0), values.std(axis=0), *quantiles]
    for name, array in zip(("mean", "std", "q01", "q99"), expected, strict=True):
        np.testing.assert_allclose(
            getattr(found, name), array, rtol=EXACT, atol=EXACT, err_msg=name
        )


@pytest.mark.parametrize("rows", [2, 3, 101, 5000])
def test_statistics_are_numpys(rows):
    rng = np.random.default_rng(rows)
    values = np.stack(
        [
            rng.normal(size=rows),
            rng.normal(size=rows) * 1e-4 + 100.0,  # far from 0: sums of squares would cancel
            rng.integers(-2, 3, rows).astype(float),  # ties, and zeros of both signs
            np.full(rows, -7.25),
            -rng.exponential(size=rows) * 1e30,
        ],
        axis=1,
    )
    values[::7, 2] *= -0.0
    values = values.astype(np.float32).astype(np.float64)
    for size in (rows, 1000, 1):
        blocks = [values[start : start + size] for start in range(0, rows, size)][:2000]
        assert_stats(feature_stats(lambda blocks=blocks: blocks), np.concatenate(blocks))


def test_quantiles_are_between_neighbours():
    values = np.arange(1, 102, dtype=np.float32)[::-1, None]
    found = feature_stats(lambda: np.array_split(values, 5))
    assert (found.q01, found.q99) == ([2.0], [100.0])
    halves = feature_stats(lambda: [values[:51]])
    np.testing.assert_allclose([*halves.q01, *halves.q99], [51.5, 100.5], rtol=EXACT)


def test_moments_of_parts():
    values = np.random.default_rng(0).normal(size=(100, 3)) + 1e6
    whole = Moments(values[:1])
    for part in np.split(values[1:], [1, 10, 60]):
        whole.merge(Moments(part))
    assert whole.count == 100
    np.testing.assert_allclose(whole.mean, values.mean(axis=0), rtol=EXACT)
    np.testing.assert_allclose(whole.std, values.std(axis=0), rtol=EXACT)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([], "expected at least 2 rows, got 0"),
        ([np.zeros((1, 2))], "expected at least 2 rows, got 1"),
        ([np.zeros((3, 2)), np.array([[0.0, np.nan]])], "expected finite numbers"),
    ],
)
def test_numbers_without_statistics(blocks, message):
    with pytest.raises(ValueError, match=f"statistics: {message}"):
        feature_stats(lambda: blocks)


@pytest.fixture(scope="module")
def episodes() -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {
            "task": "wave",
            "observation.state": rng.uniform(0, 1, (length, 14)).astype(np.float32),
            "action": rng.uniform(0, 1, (length, 14)).astype(np.float32),
        }
        for length in LENGTHS
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory, episodes) -> Path:
    features = {key: Feature("float32", (14,)) for key in ("observation.state", "action")}
    root = tmp_path_factory.mktemp("datasets") / "wave"
    write_dataset(root, episodes, fps=FPS, features=features)
    return root


def config(root: Path, **options) -> DataConfig:
    repack = {"state": "observation.state", "actions": "action"}
    return DataConfig(repo_id=str(root), robot="aloha", repack=repack, **options)


def chunks(actions: np.ndarray) -> np.ndarray:
    """[T, H, A]: an episode's actions from each frame on, the last one repeated."""
    times = np.arange(len(actions))[:, None] + np.arange(HORIZON)
    return actions[times.clip(max=len(actions) - 1)]


@pytest.mark.parametrize("block", [7, 1024])
def test_statistics_are_of_what_is_trained_on(root, episodes, monkeypatch, block):
    """Every chunk from every frame, converted and relative to the frame's state."""
    monkeypatch.setattr(norm_stats, "BLOCK", block)
    states, actions = [], []
    for episode in episodes:
        state = aloha_state_to_pi(episode["observation.state"].astype(np.float64))
        chunk = aloha_actions_to_pi(chunks(episode["action"].astype(np.float64)))
        joints = np.arange(14) % 7 != 6
        states.append(state)
        actions.append((chunk - np.where(joints, state, 0)[:, None]).reshape(-1, 14))
    found = dataset_norm_stats(config(root), HORIZON)
    assert_stats(found.state, np.concatenate(states))
    assert_stats(found.actions, np.concatenate(actions))


def test_some_frames_alone(root):
    part = dataset_norm_stats(config(root), HORIZON, max_frames=20)
    whole = dataset_norm_stats(config(root), HORIZON)
    assert (part.state.mean != whole.state.mean).all()
    again = dataset_norm_stats(config(root), HORIZON, max_frames=20)
    assert part.to_file() == again.to_file()
    most = dataset_norm_stats(config(root), HORIZON, max_frames=1000)
    assert most.to_file() == whole.to_file()
    with pytest.raises(ValueError, match="max_frames: expected at least 2, got 1"):
        dataset_norm_stats(config(root), HORIZON, max_frames=1)


def training_config(root: Path, assets: Path, **options) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        name="wave_config",
        data=config(root, **options),
        model=Pi0Config(action_horizon=HORIZON),
        assets_dirs=assets / "wave_config",
    )


def test_the_command(root, tmp_path, monkeypatch, capsys):
    training = training_config(root, tmp_path)
    monkeypatch.setattr(configs, "get", lambda name: training)
    with pytest.raises(FileNotFoundError, match=r"norm_stats\.json: expected") as raised:
        require_norm_stats(training)
    cli.main(shlex.split(str(raised.value).partition("To compute them: pruner ")[2]))
    path = tmp_path / "wave_config/wave/norm_stats.json"
    assert str(path) in capsys.readouterr().out.replace("\n", "")
    found = require_norm_stats(training)
    assert found is not None
    assert found.to_file() == path.read_bytes()
    assert found.to_file() == dataset_norm_stats(training.data, HORIZON).to_file()
    assert checkpoint_assets(training, found) == {"wave/norm_stats.json": path.read_bytes()}
    other = Options(
        config_name="wave_config", repo_id=f"{root}/.", assets_base_dir=tmp_path / "other"
    )
    compute_norm_stats.run(other)
    assert (tmp_path / "other/wave_config/wave/norm_stats.json").read_bytes() == path.read_bytes()


def test_statistics_from_elsewhere(root, tmp_path, monkeypatch, capsys):
    training = training_config(root, tmp_path, assets_dir=str(tmp_path / "base"), asset_id="x")
    with pytest.raises(FileNotFoundError, match=r"base/x/norm_stats.json.*leave data.assets_dir"):
        require_norm_stats(training)
    stats = dataset_norm_stats(training.data, HORIZON)
    stats.write(tmp_path / "base/x")
    assert isinstance(require_norm_stats(training), NormStats)
    monkeypatch.setattr(configs, "get", lambda name: training)
    compute_norm_stats.run(Options(config_name="wave_config"))
    assert "until that is unset" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "wave_config/x/norm_stats.json").exists()


def test_generated_data_needs_none(tmp_path, monkeypatch):
    training = training_config(tmp_path, tmp_path)
    training.data = DataConfig(fake=True)
    assert require_norm_stats(training) is None
    assert checkpoint_assets(training, None) == {}
    monkeypatch.setattr(configs, "get", lambda name: training)
    with pytest.raises(ValueError, match="config_name: expected one with a dataset, got 'wave"):
        compute_norm_stats.run(Options(config_name="wave_config"))


def test_errors_name_the_dataset(root, tmp_path):
    with pytest.raises(ValueError, match=f"{root}: delta_action_mask: expected"):
        dataset_norm_stats(config(root, delta_action_mask=(True,) * 15), HORIZON)
    with pytest.raises(FileNotFoundError, match="expected the folder of a LeRobot dataset"):
        dataset_norm_stats(dataclasses.replace(config(root), repo_id=str(tmp_path / "no")), HORIZON)
