"""Training on several devices is training on one: in processes of their own."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from parity_tests import training_runs as training
from parity_tests.harness import BACKENDS, error, forced_devices, parameters
from parity_tests.record import check
from pruner_spec.config import CAMERAS
from pruner_spec.training import Batch

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_fast")]

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 3
SIZE = 16  # of the global batch
RUNS = {
    "whole": training.varied(training.THE_RUN, STEPS),
    "in parts": training.varied(
        training.THE_RUN, STEPS, accumulation=2, gradient_checkpointing="full"
    ),
    "float32": training.computed_in(
        training.varied(training.THE_RUN, STEPS), "float32", token_pruning_enabled=False
    ),
}


def mapped(function, batch):
    """The batch with a function applied to every array."""
    return Batch(
        **{
            field.name: {camera: function(value[camera]) for camera in CAMERAS}
            if isinstance(value := getattr(batch, field.name), dict)
            else function(value)
            for field in dataclasses.fields(Batch)
        }
    )


def draw_batch(config, step):
    """The global batch of a step."""
    drawn = [training.draw_batch(config, step * SIZE + part) for part in range(SIZE // 4)]
    names = {field.name for field in dataclasses.fields(Batch)} - {"images", "image_masks"}
    arrays = {name: np.concatenate([getattr(each, name) for each in drawn]) for name in names}
    for name in ("images", "image_masks"):
        arrays[name] = {
            camera: np.concatenate([getattr(each, name)[camera] for each in drawn])
            for camera in CAMERAS
        }
    return Batch(**arrays | {"places": np.arange(SIZE)})


def train(make, run, share=slice(None)):
    """A run of which the last step is made by another trainer, from the state of the first.

    Args:
        make: a trainer, given its arguments.
        run: a row of `RUNS`.
        share: of each batch.

    Returns:
        Every step's metrics and all arrays of the last state, by name.
    """
    batches = [
        mapped(lambda array: array[share], draw_batch(run.config, step)) for step in range(STEPS)
    ]
    begun = make(run.config, run.settings, parameters(run.config))
    metrics = [begun.step(batch) for batch in batches[:-1]]
    trainer = make(run.config, run.settings, None)
    trainer.restore(begun.state())
    metrics.append(trainer.step(batches[-1]))
    state = trainer.state()
    found = {
        f"metrics/{step}/{name}": np.array(float(value))
        for step, each in enumerate(metrics)
        for name, value in each.items()
    }
    for field in ("parameters", "average", "first", "second"):
        found |= {f"{field}/{name}": array for name, array in getattr(state, field).items()}
    return found


TORCH = """
import json, os, sys
import numpy as np
import torch
from parity_tests.test_devices import RUNS, train
from pruner_torch import sharding, training

rank, world, cases, folder = json.loads(sys.argv[1])
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
)
for fsdp, name in cases:
    mesh = sharding.make_mesh(fsdp, device="cpu")

    def make(*arguments):
        return training.Trainer(*arguments, mesh=mesh, device="cpu")

    found = train(make, RUNS[name], slice(rank, None, world))
    if rank == 0:
        np.savez(f"{folder}/{fsdp}, {name}.npz", **found)
torch.distributed.destroy_process_group()
"""

JAX = """
import json, sys
import jax
import numpy as np
from parity_tests.test_devices import RUNS, train
from pruner_jax import sharding, training

cases, folder = json.loads(sys.argv[1])
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_default_matmul_precision", "highest")
sharding.SPLIT_FROM_BYTES = 0

for number, (fsdp, name) in enumerate(cases):
    mesh, trainers = sharding.make_mesh(fsdp), []

    def make(*arguments):
        trainers.append(training.Trainer(*arguments, mesh=mesh))
        return trainers[-1]

    with jax.enable_x64(RUNS[name].config.dtype == "float64"):
        np.savez(f"{folder}/{fsdp}, {name}.npz", **train(make, RUNS[name]))
    assert training._step._cache_size() == number + 1
    state, last = trainers[-1]._state, trainers[-1]._state.trained
    split = {each for each, array in last.items() if not array.sharding.is_fully_replicated}
    assert bool(split) == (fsdp > 1) and ("gemma.embedder.embedding" in split) == (fsdp > 1)
    for arrays in (state.average, state.first, state.second):
        assert all(arrays[each].sharding == array.sharding for each, array in last.items())
"""


def start(script, arguments, **environment):
    """A process that runs a script from the root, on the CPU."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, "-c", script, json.dumps(arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def finish(processes):
    """Waits for them all; the first's complaint is the test's."""
    complaints = [process.communicate()[1] for process in processes]
    for process, complaint in zip(processes, complaints, strict=True):
        assert process.returncode == 0, complaint


@functools.cache
def on_one_device(backend_name, name):
    """The run in this process, on one device."""
    backend, run = BACKENDS[backend_name], RUNS[name]

    def make(*arguments):
        device = {"device": "cpu"} if backend.name == "torch" else {}
        return backend.module("training").Trainer(*arguments, **device)

    with backend.precision(run.config.dtype):
        return train(make, run)


def same(who, name, found, expected):
    """Metrics, parameters and average."""
    assert set(found) == set(expected)
    dtype = RUNS[name].config.dtype
    for each in sorted(found):
        compared = ("metrics/", "parameters/", "average/")
        is_noise = dtype == "float32" and not each.startswith("metrics/")
        if each.startswith(compared) and not is_noise:
            check("devices", dtype, who, error(found[each], expected[each]), each)


# (processes, devices over which weights are split, run)
TORCH_CASES = [
    (2, 1, "whole"),
    (2, 1, "in parts"),
    (2, 2, "whole"),
    (2, 2, "in parts"),
    (2, 2, "float32"),
    (4, 2, "whole"),
]
JAX_CASES = [(1, "whole"), (2, "in parts"), (8, "float32")]


@pytest.fixture(scope="module")
def made_by_torch(tmp_path_factory):
    """All cases of a number of processes, which make them one after the other; their folder."""

    @functools.cache
    def made(world):
        folder = tmp_path_factory.mktemp("torch")
        cases = [(fsdp, name) for processes, fsdp, name in TORCH_CASES if processes == world]
        finish([start(TORCH, [rank, world, cases, str(folder)]) for rank in range(world)])
        return folder

    return made


@pytest.fixture(scope="module")
def made_by_jax(tmp_path_factory):
    """All cases, by one process that sees eight devices; their folder."""
    folder = tmp_path_factory.mktemp("jax")
    finish([start(JAX, [JAX_CASES, str(folder)], **forced_devices(8))])
    return folder


@pytest.mark.skipif("torch" not in BACKENDS, reason="is about PyTorch")
@pytest.mark.parametrize(("world", "fsdp", "name"), TORCH_CASES)
def test_torch_in_processes(made_by_torch, world, fsdp, name):
    """DDP, FSDP2, and FSDP2 within groups that repeat each other."""
    kind = "DDP" if fsdp == 1 else f"FSDP2 in groups of {fsdp}"
    found = np.load(made_by_torch(world) / f"{fsdp}, {name}.npz")
    same(f"torch, {world} processes, {kind}", name, found, on_one_device("torch", name))


@pytest.mark.skipif("jax" not in BACKENDS, reason="is about JAX")
@pytest.mark.parametrize(("fsdp", "name"), JAX_CASES)
def test_jax_on_eight_devices(made_by_jax, fsdp, name):
    found = np.load(made_by_jax / f"{fsdp}, {name}.npz")
    same(f"jax, 8 devices, weights over {fsdp}", name, found, on_one_device("jax", name))


@pytest.mark.skipif("jax" not in BACKENDS, reason="is about JAX")
def test_devices_must_divide_what_they_share():
    sharding = BACKENDS["jax"].module("sharding")
    for bad in (0, 3):
        with pytest.raises(ValueError, match=rf"fsdp_devices: expected a divisor of \d+ .*{bad}"):
            sharding.make_mesh(bad)
