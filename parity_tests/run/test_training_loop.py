"""The loop, its checkpoints and its metrics, around a trainer that only counts."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from convert import jax_to_pytorch, output, pytorch_to_jax
from convert.reading import open_checkpoint
from parity_tests.cases import TINY_ADAPTED, tiny_config
from pruner_run import metrics, run_checkpoint, training_loop
from pruner_run.configs import TrainConfig
from pruner_run.data.config import DataConfig
from pruner_spec.layout import to_named
from pruner_spec.optimization import CosineDecaySchedule
from pruner_spec.parameters import random_parameters
from pruner_spec.training import Batch, TrainState

MODEL = tiny_config(dtype="float32", vision_variant="tiny/56")
STATS = {"cube/norm_stats.json": b'{"norm_stats": {}}'}


class Counter:
    """A trainer whose parameters say which batches it saw, in order."""

    def __init__(self, fail_at: int | None = None, kill_at: int | None = None) -> None:
        self._parameters = dict(random_parameters(MODEL, seed=0))
        self._step, self._kill_at = 0, kill_at
        self.seen: list[int] = []

    def step(self, batch: Batch) -> dict[str, float]:
        if self._step == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        [place] = batch.places
        self.seen.append(int(place))
        bias = self._parameters["action_out_proj.bias"]
        self._parameters["action_out_proj.bias"] = bias * np.float32(0.5) + np.float32(place)
        self._step += 1
        return {"loss": float(self._parameters["action_out_proj.bias"].sum())}

    def state(self, *, everywhere: bool = True) -> TrainState:
        zeros = {"action_out_proj.bias": np.full(7, self._step, np.float32)}
        average = {k: v + np.float32(1) for k, v in self._parameters.items()}
        return TrainState(self._step, self._parameters, average, zeros, zeros)

    def restore(self, state: TrainState) -> None:
        self._step = state.step
        self._parameters = {name: np.asarray(array) for name, array in state.parameters.items()}
        bias = self._parameters["action_out_proj.bias"]
        np.testing.assert_array_equal(np.asarray(state.first["action_out_proj.bias"]), self._step)
        np.testing.assert_array_equal(np.asarray(state.average["action_out_proj.bias"]), bias + 1)


class Alone:
    """One device of one process."""

    process, processes, count = 0, 1, 1

    def largest(self, number: int) -> int:
        return number


class Numbers:
    """Batches that say their step."""

    def __init__(self, start: int) -> None:
        self._start = start
        self.closed = False

    def __iter__(self):
        for step in range(self._start, 1000):
            yield Batch({}, {}, None, None, None, None, np.array([step]))

    def close(self) -> None:
        self.closed = True


def config(folder: Path, **changes) -> TrainConfig:
    settings = {
        "name": "counting",
        "exp_name": "run",
        "model": MODEL,
        "data": DataConfig(fake=True),
        "num_train_steps": 10,
        "log_interval": 2,
        "save_interval": 4,
        "keep_period": None,
        "batch_size": 1,
        "lr_schedule": CosineDecaySchedule(warmup_steps=2, decay_steps=10),
        "checkpoint_base_dir": folder,
    }
    return TrainConfig(**(settings | changes))


def train(config: TrainConfig, trainer: Counter | None = None) -> tuple[Counter, int]:
    """As `pruner_run.train.run`, with the counting trainer."""
    trainer = Counter() if trainer is None else trainer
    found = training_loop.prepare(config)
    start = 0
    if found is not None:
        start = int(found.name) + 1
        trainer.restore(run_checkpoint.load(found, config.model))
    console = Console(quiet=True)
    last = training_loop.run(config, trainer, Numbers(start), start, STATS, console, Alone())
    return trainer, last


def lines(config: TrainConfig) -> list[dict]:
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").open()]


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_run(backend, tmp_path):
    run = config(tmp_path, backend=backend)
    trainer, last = train(run)
    assert (trainer.seen, last) == (list(range(10)), 9)
    assert [line["step"] for line in lines(run)] == list(range(10))
    rates = [line["learning_rate"] for line in lines(run)]
    assert rates == [run.lr_schedule.learning_rate(step) for step in range(10)]
    assert run_checkpoint.steps(run) == [9]
    folder = run.run_dir / "9"
    assert (folder / "assets/cube/norm_stats.json").read_bytes() == STATS["cube/norm_stats.json"]
    assert (folder / ("params" if backend == "jax" else "model.safetensors")).exists()


def test_checkpoints_that_are_kept(tmp_path):
    run = config(tmp_path, save_interval=2, keep_period=4)
    train(run)
    assert run_checkpoint.steps(run) == [4, 8, 9]


@pytest.mark.parametrize("other", ["jax", "torch"])
def test_a_resumed_run_is_the_same_run(other, tmp_path):
    """Begun in JAX, ended in either, from a checkpoint in its middle."""
    whole = config(tmp_path / "whole")
    expected, _ = train(whole)
    half = config(tmp_path, save_interval=3, keep_period=3)
    train(half)
    for step in (9, 6):
        shutil.rmtree(half.run_dir / str(step))
    assert run_checkpoint.steps(half) == [3]
    resumed, _ = train(dataclasses.replace(half, resume=True, backend=other))
    assert resumed.seen == list(range(4, 10))
    assert lines(half) == lines(whole)
    bias = "action_out_proj.bias"
    np.testing.assert_array_equal(
        resumed.state().parameters[bias], expected.state().parameters[bias]
    )


KILLED = """
from pathlib import Path
from parity_tests.run.test_training_loop import Counter, config, train
train(config(Path({folder!r})), Counter(kill_at=7))
"""


def test_killed_and_resumed(tmp_path):
    root = Path(__file__).parents[2]
    script = KILLED.format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], cwd=root)
    assert done.returncode == -signal.SIGKILL
    run = config(tmp_path, resume=True)
    assert run_checkpoint.steps(run) == [4]
    with (run.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # as a process leaves it that is killed as it writes
    resumed, _ = train(run)
    assert resumed.seen == list(range(5, 10))
    whole = config(tmp_path / "whole")
    train(whole)
    assert lines(run) == lines(whole)


def test_sigterm_saves_and_leaves(tmp_path):
    class Terminated(Counter):
        def step(self, batch):
            if batch.places[0] == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().step(batch)

    run = config(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    _, last = train(run, Terminated())
    assert last == 5
    assert run_checkpoint.steps(run) == [5]
    assert signal.getsignal(signal.SIGTERM) is before
    resumed, _ = train(dataclasses.replace(run, resume=True))
    assert resumed.seen == [6, 7, 8, 9]


@pytest.mark.parametrize("damage", ["cut", "changed", "lost", "no JSON", "no record"])
def test_a_damaged_checkpoint_is_passed_over(damage, tmp_path, caplog):
    run = config(tmp_path, save_interval=4, keep_period=4)
    train(run)
    newest = run.run_dir / "9"
    if damage == "cut":
        state = newest / "train_state.safetensors"
        state.write_bytes(state.read_bytes()[:-1])
    elif damage == "changed":
        with next((newest / "params/d").iterdir()).open("r+b") as file:
            byte = file.read(1)
            file.seek(0)
            file.write(bytes([byte[0] ^ 1]))
    elif damage == "lost":
        (newest / "config.json").unlink()
    else:
        (newest / "run.json").write_text("{" if damage == "no JSON" else "{}")
    resumed, _ = train(dataclasses.replace(run, resume=True))
    assert "passing over a damaged checkpoint" in caplog.text
    assert resumed.seen == [9]


def test_damaged_checkpoints_alone_are_no_run_to_begin_again(tmp_path):
    run = config(tmp_path)
    train(run)
    (run.run_dir / "9" / "train_state.safetensors").write_bytes(b"")
    expected = r"a whole checkpoint in .*, got damaged ones alone, of the steps \[9\]; --overwrite"
    with pytest.raises(ValueError, match=expected):
        train(dataclasses.replace(run, resume=True))
    assert len(lines(run)) == 10


def test_what_a_killed_save_has_left_is_removed(tmp_path):
    """Of a step that is not saved again, so that no later save of it puts that in order."""
    run = config(tmp_path)
    partial = run.run_dir / ".3.incomplete" / "params"
    partial.mkdir(parents=True)
    (run.run_dir / ".3.lock").touch()
    train(dataclasses.replace(run, resume=True))
    assert sorted(path.name for path in run.run_dir.iterdir()) == ["9", "metrics.jsonl"]


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    run = config(tmp_path)

    def full(path, arrays):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    class Filled(Counter):
        def step(self, batch):
            if batch.places[0] == 6:
                monkeypatch.setattr(run_checkpoint, "_write_state", full)
            return super().step(batch)

    with pytest.raises(OSError, match="No space left"):
        train(run, Filled())
    monkeypatch.undo()
    assert run_checkpoint.steps(run) == [4]
    assert [path.name for path in run.run_dir.iterdir() if path.name.startswith(".")] == []
    assert train(dataclasses.replace(run, resume=True))[0].seen == [5, 6, 7, 8, 9]


def test_resuming_with_another_config_is_refused(tmp_path):
    run = config(tmp_path)
    train(run)
    other = dataclasses.replace(run, resume=True, batch_size=2, seed=7, num_workers=5)
    with pytest.raises(ValueError, match="of a run with another config") as raised:
        train(other)
    assert "--batch_size: expected 1, got 2" in str(raised.value)
    assert "--seed: expected 42, got 7" in str(raised.value)
    assert "num_workers" not in str(raised.value)


def test_a_run_is_not_overwritten_unasked(tmp_path):
    run = config(tmp_path)
    train(run)
    with pytest.raises(FileExistsError, match="expected no run, or --resume"):
        train(run)
    with pytest.raises(ValueError, match="one of --resume and --overwrite"):
        train(dataclasses.replace(run, resume=True, overwrite=True))
    again, _ = train(dataclasses.replace(run, overwrite=True))
    assert again.seen == list(range(10))
    assert [line["step"] for line in lines(run)] == list(range(10))


@pytest.mark.parametrize("option", ["resume", "overwrite"])
def test_a_run_that_another_process_makes_is_left_alone(option, tmp_path):
    run = config(tmp_path)
    train(run)
    shutil.rmtree(run.run_dir / "9")
    with (
        output.locked(run.run_dir),
        pytest.raises(FileExistsError, match=r"another run is writing .*/run"),
    ):
        train(dataclasses.replace(run, **{option: True}))
    assert len(lines(run)) == 10


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    class Diverging(Counter):
        def step(self, batch):
            found = super().step(batch)
            return found | {"loss": float("nan")} if batch.places[0] == 6 else found

    run = config(tmp_path)
    with pytest.raises(ValueError, match="expected a finite number in step 6, got nan"):
        train(run, Diverging())
    assert run_checkpoint.steps(run) == [4]


@pytest.mark.parametrize("name", ["grad_norm", "param_norm"])
def test_weights_that_are_not_finite_are_not_saved(name, tmp_path):
    """The loss of the step that makes them is finite still."""

    class Overflowing(Counter):
        def step(self, batch):
            return super().step(batch) | {name: float("inf") if batch.places[0] == 8 else 1.0}

    run = config(tmp_path)
    with pytest.raises(ValueError, match=f"{name}: expected a finite number in step 8, got inf"):
        train(run, Overflowing())
    assert run_checkpoint.steps(run) == [4]


def test_collapse_is_warned_of(caplog):
    healthy = {"prune/kept_tokens_mean": 40.0, "prune/argmax_top1_share": 0.3}
    assert not metrics.warn_of_collapse(3, healthy)
    assert not metrics.warn_of_collapse(3, {"loss": 1.0})
    assert metrics.warn_of_collapse(3, healthy | {"prune/kept_tokens_mean": 2.0})
    assert metrics.warn_of_collapse(3, healthy | {"prune/argmax_top1_share": 0.99})
    assert "--model.token_prune_min_keep 16" in caplog.text


@pytest.mark.parametrize("adapters", [{}, TINY_ADAPTED], ids=["plain", "adapters"])
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_runs_checkpoint_converts(backend, adapters, tmp_path):
    """To the other framework, strictly, and into both backends' models."""
    model = tiny_config(dtype="float32", vision_variant="tiny/56", **adapters)
    weights = dict(random_parameters(model, seed=5))
    state = TrainState(1, weights, None, {}, {})
    run = config(tmp_path, backend=backend, model=model)
    run.run_dir.mkdir(parents=True)
    path = run_checkpoint.save(run, 0, state, STATS)
    converted = tmp_path / "converted"
    if backend == "jax":
        jax_to_pytorch(path, converted, precision="float32", lora="keep")
    else:
        pytorch_to_jax(path, converted)
    for place in (path, converted):
        found = dict(to_named(open_checkpoint(place), model))
        assert found.keys() == weights.keys()
        for name, array in weights.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert (converted / "assets/cube/norm_stats.json").exists()
    loaded = run_checkpoint.load(path, model)
    assert loaded.average is None
    assert loaded.parameters.keys() == weights.keys()


@pytest.mark.parametrize("has_average", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_checkpoint_has_the_state_bit_for_bit(dtype, has_average, tmp_path):
    model = tiny_config(dtype=dtype, vision_variant="tiny/56")
    generator = np.random.default_rng(3)
    shapes = {name: array.shape for name, array in random_parameters(model, seed=0)}

    def drawn():
        return {name: generator.standard_normal(s).astype(dtype) for name, s in shapes.items()}

    state = TrainState(4, drawn(), drawn() if has_average else None, drawn(), drawn())
    run = config(tmp_path, backend="torch", model=model)
    run.run_dir.mkdir(parents=True)
    found = run_checkpoint.load(run_checkpoint.save(run, 3, state, STATS), model)
    assert (found.step, found.average is None) == (4, not has_average)
    for field in ("parameters", "average", "first", "second"):
        for name, array in (getattr(state, field) or {}).items():
            assert getattr(found, field)[name].dtype == dtype
            np.testing.assert_array_equal(getattr(found, field)[name], array, err_msg=name)
