"""Starts of `pruner bench`'s processes, with weights from a disk."""

import dataclasses
import os
import sys

import numpy as np
import pytest
from rich.console import Console

from benchmarks import inference_speed, random_checkpoint
from parity_tests.harness import BACKENDS
from parity_tests.run.benches import options, pretend
from pruner_run import backend as backends
from pruner_run import bench, bench_cases, bench_process, bench_weights
from pruner_run.bench_cases import MODELS, Case, Setup
from pruner_run.bench_results import read
from pruner_run.bench_worker import Job

ONE = next(reversed(BACKENDS))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    random_checkpoint.write(folder, MODELS["tiny"])
    return folder


def test_random_weights_on_a_disk(checkpoint):
    """Any backend reads them, in the time that is counted, and they compute something."""
    assert {path.name for path in checkpoint.iterdir()} == {"config.json", "model.safetensors"}
    weights, reading = bench_weights.clocked(str(checkpoint))
    assert weights is not None
    assert reading is not None
    opened = reading.seconds
    case, setup = Case(keep="implicit", num_steps=1), Setup(config="tiny", dtype="float32")
    observation, noise = bench_cases.inputs(case, setup)
    model = backends.load(ONE).model(setup.model_config(case), weights)
    assert opened < reading.seconds < 60
    actions = model.sample_actions(observation, noise, 1)
    assert np.isfinite(actions).all()
    assert np.abs(actions - noise).max() > 0
    bench_weights.forget(checkpoint)
    with pytest.raises(OSError, match="not empty"):
        random_checkpoint.write(checkpoint, MODELS["tiny"])


def test_there_are_no_weights_to_be_clocked():
    assert bench_weights.clocked(None) == (None, None)


def test_processes_that_only_start(tmp_path, checkpoint, monkeypatch):
    """Each has its line, and none its row; they make the first case's first two calls."""
    few = "assert len(job['cases']) == 2 or job['setup']['calls'] == 1"
    given = f"assert job['setup']['checkpoint'] == {str(checkpoint)!r}"
    pretend(monkeypatch, f"{few}; {given}; row['reading_s'] = 0.05")
    ways = {"path": "both", "starts": 3, "checkpoint": checkpoint, "backend": ONE}
    found = bench.measure(
        options(tmp_path, **ways), [Case(batch=1), Case(batch=2)], Console(quiet=True)
    )
    assert found.failures == ()
    assert [(start.path, start.number) for start in found.starts] == [
        (path, number) for path in ("fast", "plain") for number in (1, 2, 3)
    ]
    assert {start.reading_s for start in found.starts} == {0.05}
    assert len(found.rows) == 4
    assert found.options["checkpoint"] == str(checkpoint)
    assert read(tmp_path / "results.json") == found


def test_a_start_that_fails(tmp_path, monkeypatch):
    pretend(monkeypatch, "if job['setup']['calls'] == 1: sys.exit('not twice')")
    given = options(tmp_path, starts=2, backend=ONE)
    found = bench.measure(given, [Case()], Console(quiet=True))
    assert [start.number for start in found.starts] == [1]
    (failure,) = found.failures
    assert failure.error == "start 2: the process ended with status 1: not twice"


def test_a_checkpoint_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="a path that does not exist"):
        bench.run(options(tmp_path / "out", checkpoint=tmp_path / "nowhere"))
    assert not (tmp_path / "out").exists()


def test_jax_leaves_memory_to_others():
    """What it would take beforehand would be its peak, and PyTorch would not have it."""
    say = "import json, os; print(json.dumps(os.environ['XLA_PYTHON_CLIENT_PREALLOCATE']))"
    job = Job(backend="jax", path="fast", device="cuda", setup=Setup(), cases=(), started=0.0)
    assert list(bench_process.events(job, (sys.executable, "-c", say))) == ["false"]


@pytest.mark.slow
def test_starting_twice(tmp_path, monkeypatch):
    """Where nothing is compiled yet, and where all is; the caches are gone afterwards."""
    for name in inference_speed._CACHES:
        monkeypatch.delenv(name, raising=False)
    given = inference_speed.Options(
        part="startup",
        device="cpu",
        config="tiny",
        backend=",".join(BACKENDS),
        calls=2,
        weights=tmp_path / "weights",
        output=tmp_path / "out",
    )
    inference_speed.measure(given)
    found = read(tmp_path / "out" / "results.json")
    assert found.failures == ()
    expected = [(name, number) for name in BACKENDS for number in (1, 2)]
    assert [(start.backend, start.number) for start in found.starts] == expected
    for start in found.starts:
        assert start.reading_s is not None
        assert 0 < start.reading_s < start.model_s
        assert set(start.imports_s) == {"python", "framework", "project"}
    assert not set(inference_speed._CACHES) & set(os.environ)
    again = dataclasses.replace(given, overwrite=True, config="pi06")
    with pytest.raises(ValueError, match="config: expected one of pi05, pi0, tiny, got 'pi06'"):
        inference_speed.measure(again)
