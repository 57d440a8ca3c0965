"""`pruner train` on several devices and in several processes, as a user starts it."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from parity_tests.harness import BACKENDS, error, forced_devices
from parity_tests.record import check
from pruner_run import configs, train

NAME = "pi05_transfer_cube_tiny"
STEPS = 4

needs_torch = pytest.mark.skipif("torch" not in BACKENDS, reason="is about PyTorch")
needs_jax = pytest.mark.skipif("jax" not in BACKENDS, reason="is about JAX")


def arguments(folder, exp_name, backend, **options):
    given = {
        "exp_name": exp_name,
        "backend": backend,
        "checkpoint_base_dir": folder,
        "assets_base_dir": folder / "assets",
        "batch_size": 4,
        "num_train_steps": STEPS,
        "log_interval": 1,
    }
    pairs = [(f"--{name}", str(value)) for name, value in (given | options).items()]
    return [NAME, *(word for pair in pairs for word in pair)]


@pytest.fixture(scope="module")
def alone(folder):
    """The losses of the run on one device, in whichever backend there is."""
    train.main(arguments(folder, "alone", next(reversed(BACKENDS))))
    return losses(folder, "alone")


def losses(folder, exp_name):
    lines = (folder / NAME / exp_name / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(len(lines)))
    return [json.loads(line)["loss"] for line in lines]


def same(who, found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        check("devices", "float32", who, error(ours, theirs))


def start(command, **environment):
    """A process that computes on the CPU, and compiles fast."""
    environment = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    } | environment
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes):
    for process in processes:
        said, _ = process.communicate()
        assert process.returncode == 0, said


def torchrun(given):
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return [*launch, "-m", "pruner_run.train", *given]


@needs_torch
@pytest.mark.slow
def test_begun_in_two_processes_finished_in_one(folder, alone):
    """FSDP2 under torchrun, then one process: its checkpoints are of no number of devices."""
    options = {"save_interval": 1, "keep_period": 1}
    given = arguments(folder, "torchrun", "torch", **options)
    finish(start(torchrun([*given, "--fsdp_devices", "2"])))
    same("pruner train, FSDP2 in 2 processes", losses(folder, "torchrun"), alone)
    for step in (2, 3):
        shutil.rmtree(folder / NAME / "torchrun" / str(step))
    train.main([*given, "--resume"])
    same("pruner train, FSDP2, then one process", losses(folder, "torchrun"), alone)


@needs_jax
@pytest.mark.slow
def test_jax_in_two_processes_of_two_devices(folder, alone):
    given = arguments(folder, "processes", "jax", fsdp_devices=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
    } | forced_devices(2)
    command = ["pruner_run.train", *given]
    finish(*(start(command, JAX_PROCESS_ID=str(number), **shared) for number in range(2)))
    same("pruner train, JAX in 2 processes", losses(folder, "processes"), alone)


@needs_torch
@pytest.mark.slow
def test_sigterm_to_one_process_ends_all_at_one_step(folder):
    given = arguments(folder, "stopped", "torch", num_train_steps=1000)
    process = start(torchrun(given))
    metrics = folder / NAME / "stopped" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.1)
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(workers.stdout.split()[-1]), signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    [saved] = [path.name for path in metrics.parent.iterdir() if path.name.isdecimal()]
    assert len(losses(folder, "stopped")) == int(saved) + 1
    assert f"stopped after step {saved}, which is saved" in said


def test_a_batch_must_fit_the_devices():
    class Six:
        process, processes, count = 0, 6, 6

    config = dataclasses.replace(configs.get(NAME), batch_size=24, accumulation=2)
    train._check_batch(config, Six())
    with pytest.raises(ValueError, match="batch_size: expected a multiple of 12, for 6 devices"):
        train._check_batch(dataclasses.replace(config, batch_size=18), Six())


@pytest.mark.parametrize(
    ("backend", "environment", "message"),
    [
        ("torch", {}, "torchrun --standalone --nproc_per_node"),
        ("torch", {"SLURM_STEP_NUM_TASKS": "4"}, "in 4; start a process a device"),
        ("jax", {}, "fsdp_devices: expected a divisor of"),
        ("jax", {"JAX_PROCESS_ID": "1"}, "JAX_NUM_PROCESSES"),
    ],
)
def test_devices_that_are_not_there(folder, backend, environment, message, monkeypatch, capsys):
    if backend not in BACKENDS:
        pytest.skip(f"is about {backend}")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as failed:
        train.main(arguments(folder, "none", backend, fsdp_devices=3))
    assert failed.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (folder / NAME / "none").exists()
