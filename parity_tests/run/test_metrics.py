"""What else a run writes when it is asked for: TensorBoard's files, Weights & Biases."""

import dataclasses
import importlib.util
import sys
import types

import numpy as np
import pytest

from parity_tests.run.test_training_loop import Counter, config, lines, train
from pruner_run import metrics, run_checkpoint


class Broken(Counter):
    """Ends after step 7, when 6 and 7 are not written yet and the last checkpoint is of 4."""

    def step(self, batch):
        if batch.places[0] == 8:
            raise RuntimeError("the power went out")
        return super().step(batch)


def broken_and_resumed(run):
    """The run, made in two parts."""
    with pytest.raises(RuntimeError, match="power"):
        train(run, Broken())
    assert run_checkpoint.steps(run) == [4]
    train(dataclasses.replace(run, resume=True))


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboardX")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = config(tmp_path, tensorboard_enabled=True, log_interval=3)
    broken_and_resumed(run)
    found = EventAccumulator(str(run.run_dir / "tensorboard")).Reload()
    assert sorted(found.Tags()["scalars"]) == ["learning_rate", "loss"]
    for name in ("learning_rate", "loss"):
        events = found.Scalars(name)
        assert [event.step for event in events] == list(range(10))
        expected = [np.float32(line[name]) for line in lines(run)]
        assert [event.value for event in events] == expected


class Wandb(types.ModuleType):
    """As much of wandb as is used; remembers what it was told."""

    Error = type("Error", (Exception,), {})

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace(name="wandb")  # type: ignore[assignment]
        self.begun, self.logged, self.finished = [], [], 0

    def init(self, **options):
        if options["project"] == "refused":
            raise self.Error("no API key")
        self.begun.append(options)
        return types.SimpleNamespace(id="abc", log=self.log, finish=self.finish)

    def log(self, values, *, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", module := Wandb())
    return module


def test_weights_and_biases_is_told(tmp_path, wandb):
    run = config(tmp_path, wandb_enabled=True, log_interval=3, project_name="cubes")
    broken_and_resumed(run)
    first, second = wandb.begun
    assert (first["project"], first["name"], first["dir"]) == ("cubes", "run", str(run.run_dir))
    assert (first["id"], first["resume"]) == (None, None)
    assert first["config"]["batch_size"] == 1
    assert second == first | {"id": "abc", "resume": "allow"}
    assert wandb.finished == 2
    # Step 5, of which the checkpoint does not know, is told twice, with the same numbers.
    assert [step for step, _ in wandb.logged] == [0, 1, 2, 3, 4, 5, *range(5, 10)]
    assert [{"step": step} | values for step, values in dict(wandb.logged).items()] == lines(run)
    assert wandb.logged[5] == wandb.logged[6]


def test_a_run_that_weights_and_biases_refuses(tmp_path, wandb):
    run = config(tmp_path, wandb_enabled=True, project_name="refused")
    with pytest.raises(ValueError, match="wandb_enabled: expected a run to begin, got: no API key"):
        train(run)


@pytest.mark.parametrize(
    ("option", "package"), [("tensorboard_enabled", "tensorboardX"), ("wandb_enabled", "wandb")]
)
def test_a_missing_package_is_named(option, package, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    metrics.check_installed(config(tmp_path))
    message = rf"{option}: expected {package} to be installed: pip install 'pi05-pruner\[logging\]'"
    with pytest.raises(ValueError, match=message):
        metrics.check_installed(config(tmp_path, **{option: True}))
