"""Whole runs of `pruner train`: the real data, trainers and checkpoints, from the command line.

What the runs are short of is patches: 16 a camera in the place of 256.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from parity_tests.harness import BACKENDS, error
from parity_tests.record import check
from pruner_run import configs, run_checkpoint, train

pytestmark = [pytest.mark.usefixtures("compile_fast"), pytest.mark.slow]

backends = pytest.mark.parametrize("backend", BACKENDS)
both = pytest.mark.skipif(len(BACKENDS) < 2, reason="compares the backends")
dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])

ROOT = Path(__file__).parents[2]
CONFIG = "pi05_transfer_cube_tiny"
STEPS, HALF = 16, 8
SHORT = [
    "--model.vision_variant", "tiny/56", "--batch_size", "4", "--num_train_steps", str(STEPS),
    "--lr_schedule.warmup_steps", "4", "--log_interval", "1", "--save_interval", "4",
    "--keep_period", str(HALF),
]  # fmt: skip

# As `conftest` sets JAX in this process: a run that goes on here was begun as it would be here.
ENVIRONMENT = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "PYTHONPATH": str(ROOT),
}


@pytest.fixture(scope="module")
def whole(folder):
    """The folder of a backend's uninterrupted run in a dtype, which is made once."""

    def run(backend, dtype):
        path = run_dir(folder, f"{backend}-{dtype}")
        if not path.exists():
            make(backend, arguments(folder, path.name, backend, dtype))
        return path

    return run


def run_dir(folder, name):
    return folder / "checkpoints" / CONFIG / name


def arguments(folder, name, backend, dtype):
    """A command line, behind `pruner train`."""
    return [
        CONFIG, "--exp_name", name, "--backend", backend, "--model.dtype", dtype, *SHORT,
        "--checkpoint_base_dir", str(folder / "checkpoints"),
        "--assets_base_dir", str(folder / "assets"),
    ]  # fmt: skip


def make(backend, given):
    """`pruner train` in this process, which keeps what it compiled."""
    train.main(given)
    if backend == "jax":  # a float64 run enables it for its process
        import jax

        jax.config.update("jax_enable_x64", False)


def begun(source, name):
    """A copy of a run as it was at half-way; what was written later goes, but for the metrics."""
    path = source.with_name(name)
    shutil.copytree(source, path)
    shutil.rmtree(path / str(STEPS - 1))
    assert [each.name for each in path.iterdir() if each.is_dir()] == [str(HALF)]
    return path


def recorded(path):
    """Lines of metrics.jsonl, of steps 0, 1, 2 and so on."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return lines


def losses(path):
    return np.array([line["loss"] for line in recorded(path)])


@backends
def test_killed_at_a_random_step_and_resumed(backend, folder, whole):
    """All metrics of all steps are those of the run that nobody killed, bit for bit."""
    expected = recorded(whole(backend, "float32"))
    last = random.SystemRandom().randrange(STEPS - 4)
    print(f"killed when step {last} is made")  # which pytest shows when the test fails
    path = run_dir(folder, f"{backend}-killed")
    given = arguments(folder, path.name, backend, "float32")
    killed_after(last, path / "metrics.jsonl", given)
    assert last < len((path / "metrics.jsonl").read_text().splitlines()) < STEPS
    make(backend, [*given, "--resume"])
    assert recorded(path) == expected
    same_end(path, whole(backend, "float32"), given)


def killed_after(step, metrics, given):
    """`pruner train` in a process of its own, until the step stands in its metrics."""
    with (metrics.parents[3] / "output.txt").open("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pruner_run.train", *given],
            env=os.environ | ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        while process.poll() is None:
            if metrics.exists() and len(metrics.read_text().splitlines()) > step:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.01)
        output.seek(0)
        assert process.returncode == -signal.SIGKILL, output.read()


@backends
def test_resumed_in_float64(backend, whole, monkeypatch):
    """Bit for bit: the weights in openpi's layout are float32, the state that is resumed is not.

    Nor are weights drawn that the state takes the place of: of the full size, that takes a minute.
    """
    source = whole(backend, "float64")
    path = begun(source, f"{backend}-resumed")
    given = arguments(source.parents[2], path.name, backend, "float64")
    monkeypatch.delattr(f"pruner_{backend}.training.initial_parameters")
    make(backend, [*given, "--resume"])
    assert recorded(path) == recorded(source)
    same_end(path, source, given)


def same_end(path, expected, given):
    """Weights, average and moments of the last checkpoints of two runs."""
    model = configs.parse(given, "pruner train").model
    found, wanted = (run_checkpoint.load(each / str(STEPS - 1), model) for each in (path, expected))
    assert found.step == wanted.step == STEPS
    for field in ("parameters", "average", "first", "second"):
        arrays = getattr(wanted, field)
        assert getattr(found, field).keys() == arrays.keys()
        for name, array in arrays.items():
            ours, theirs = np.asarray(getattr(found, field)[name]), np.asarray(array)
            np.testing.assert_array_equal(ours, theirs, err_msg=f"{field}: {name}")


@both
@dtypes
@backends
def test_begun_in_one_backend_and_finished_in_the_other(backend, dtype, whole):
    source = whole(backend, dtype)
    (other,) = BACKENDS.keys() - {backend}
    path = begun(source, f"{backend}-{other}-{dtype}")
    make(other, [*arguments(source.parents[2], path.name, other, dtype), "--resume"])
    names = {"jax": "params", "torch": "model.safetensors"}
    assert (path / str(HALF) / names[backend]).exists()
    assert (path / str(STEPS - 1) / names[other]).exists()
    check_losses(f"pruner train, {backend} to {other}", dtype, losses(path), losses(source))


@both
@dtypes
def test_a_run_is_the_same_in_both_backends(dtype, whole):
    found, expected = (losses(whole(backend, dtype)) for backend in BACKENDS)
    check_losses(f"pruner train, {' | '.join(BACKENDS)}", dtype, found, expected)


def check_losses(who, dtype, found, expected):
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        check("training loss", dtype, who, error(ours, theirs), f"step {step}")


@backends
def test_the_dataset_that_ships_is_learned(backend, whole):
    """No luck of single batches: the mean of the last quarter lies below the least of the first."""
    found = losses(whole(backend, "float32"))
    quarter = STEPS // 4
    assert found[-quarter:].mean() < found[:quarter].min()
