"""What a user gets wrong on `pruner train`: a message that names it, status 2, nothing written."""

import shutil
import types
from pathlib import Path

import pytest

from parity_tests.harness import BACKENDS
from parity_tests.run.test_training_loop import Counter, config, train
from pruner_run import cli, run_checkpoint
from pruner_run.assets import DEMO_EPISODE

NAME = "pi05_transfer_cube_tiny"
DATA, VIDEO = "data/chunk-000/file-000.parquet", "videos/*base_0*/chunk-000/file-000.mp4"


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    """Statistics for a dataset in any folder that is called `data`."""
    folder = tmp_path_factory.mktemp("assets")
    shutil.copytree(DEMO_EPISODE, folder / "data")
    options = ["--repo_id", str(folder / "data"), "--assets_base_dir", str(folder)]
    cli.main(["compute-norm-stats", "--config_name", NAME, *options])
    return folder


def refused(capsys, *arguments: str) -> str:
    """What the command says on its way out."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as raised:
        cli.main(["train", NAME, *arguments])
    assert raised.value.code == cli.BAD_INPUT
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--data.repo_id {tmp}/none", "expected the folder of a LeRobot dataset"),
        ("--assets_base_dir {tmp}", "To compute them: pruner compute-norm-stats --config_name"),
        (
            "--tokenizer_path {tmp}/none",
            "To get PaliGemma's, once: curl --create-dirs -o {tmp}/none",
        ),
        ("--weight_path {tmp}/none", "got a path that does not exist: {tmp}/none"),
        ("--batch_size 8 --accumulation 3", "expected a multiple of accumulation=3, got 8"),
        ("--batch_size 0", "batch_size: expected at least 1, got 0"),
        ("--save_interval 0", "save_interval: expected at least 1, got 0"),
        ("--keep_period 0", "keep_period: expected at least 1, got 0"),
        ("--num_workers -1", "workers: expected 0 or more, got -1"),
        ("--freeze (", "freeze: expected regular expressions, got '('"),
        ("--weight_missing [", "weight_missing: expected regular expressions, got '['"),
        (
            "--model.token_prune_noise_scale 0.5",
            "expected 0 in training, where --token_prune_noise_schedule takes its place; got 0.5",
        ),
        ("--freeze .", "freeze: expected to leave some parameter to train"),
        ("--exp_name ../other", "exp_name: expected a name for a folder, got '../other'"),
        ("--exp_name ./", "exp_name: expected a name for a folder"),
        ("--model.action_dim 4", "expected at most action_dim=4 numbers, got 14"),
        ("--data.robot libero", "expected the feature 'state' for 'observation/state', got"),
    ],
)
def test_settings(options, message, assets, tmp_path, capsys):
    given = {"--data.repo_id": f"{assets}/data", "--assets_base_dir": str(assets)}
    words = options.format(tmp=tmp_path).split()
    given |= dict(zip(words[::2], words[1::2], strict=True))
    given |= {"--checkpoint_base_dir": f"{tmp_path}/runs", "--backend": next(iter(BACKENDS))}
    said = refused(capsys, *(word for option in given.items() for word in option))
    assert message.format(tmp=tmp_path) in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("file", [DATA, VIDEO])
def test_damaged_files(file, assets, tmp_path, capsys):
    shutil.copytree(DEMO_EPISODE, tmp_path / "data")
    [path] = (tmp_path / "data").glob(file)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    folders = ["--assets_base_dir", str(assets), "--checkpoint_base_dir", f"{tmp_path}/runs"]
    said = refused(capsys, "--data.repo_id", f"{tmp_path}/data", *folders)
    assert f"{path}: expected a {'parquet file' if file == DATA else 'video'}" in said
    assert not (tmp_path / "runs").exists()


def test_a_run_is_overwritten_only_when_the_next_one_can_begin(assets, tmp_path, capsys):
    old = tmp_path / "runs" / NAME / "old" / "metrics.jsonl"
    old.parent.mkdir(parents=True)
    old.write_text("{}\n")
    run = ["--exp_name", "old", "--checkpoint_base_dir", f"{tmp_path}/runs", "--overwrite"]
    folders = ["--assets_base_dir", str(assets), "--data.repo_id", f"{assets}/data"]
    said = refused(capsys, *run, *folders, "--weight_path", f"{tmp_path}/none")
    assert "does not exist" in said
    assert old.exists()


def test_a_disk_without_room_for_a_checkpoint(tmp_path, monkeypatch):
    class Filled(Counter):
        def step(self, batch):
            if batch.places[0] == 6:
                full = types.SimpleNamespace(free=0)
                monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
            return super().step(batch)

    run = config(tmp_path)
    with pytest.raises(OSError, match=r"expected \S+ GB free for .*run/8, got 0.0 GB"):
        train(run, Filled())
    assert run_checkpoint.steps(run) == [4]
