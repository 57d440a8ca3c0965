"""A result is there in full or not at all, whatever ends the conversion, and whenever."""

import contextlib
import errno
import fcntl
import itertools
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import convert.writing
from convert import cli, jax_to_pytorch, pytorch_to_jax
from convert.reading import open_checkpoint
from parity_tests.cases import tiny_config
from parity_tests.convert.checkpoints import jax_tensors, save_jax, save_torch, torch_tensors
from parity_tests.convert.commands import COMMANDS, contents, converted, run
from parity_tests.harness import BACKENDS

pytestmark = pytest.mark.skipif("jax" not in BACKENDS, reason="Orbax needs JAX")

CONFIG = tiny_config()
SLOW = """
import sys, time
from convert import cli, writing

check = writing.check_finite

def check_slowly(*arguments):
    time.sleep(float(sys.argv[4]))
    check(*arguments)

writing.check_finite = check_slowly
getattr(cli, sys.argv[1])(["--checkpoint_dir", sys.argv[2], "--output_path", sys.argv[3]])
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("sources")
    save_jax(folder / "jax", jax_tensors(CONFIG))
    save_torch(folder / "torch", torch_tensors(CONFIG))
    (folder / "torch/config.json").write_text(
        '{"paligemma_variant": "tiny", "action_expert_variant": "tiny_expert"}'
    )
    return folder


@pytest.fixture
def output(tmp_path):
    (tmp_path / "outputs").mkdir()
    return tmp_path / "outputs/converted"


def started(kind, sources, output, pause):
    """A conversion in a process of its own that pauses at every write, once it has begun to."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, COMMANDS[kind].__name__, sources / kind, output, str(pause)],
        cwd=pathlib.Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that a shell runs in the background ignores interrupts, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not any(output.parent.glob(".*.incomplete/*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(1e-3)
    return process


def assert_whole(output):
    """The one thing in its folder, and every array of it can be read."""
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    arrays = open_checkpoint(output)
    assert len(arrays) > 50
    for array in arrays.values():
        np.asarray(array)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jax", "torch"])
def test_killed(kind, sources, output, capsys):
    """Nothing is at the place, and the next run there puts in order what is beside it."""
    for later in (0.0, 0.05, 0.3):
        process = started(kind, sources, output, pause=0.01)
        time.sleep(later)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not output.exists()
        assert all(name.startswith(".converted.") for name in contents(output.parent))
    converted(capsys, kind, sources / kind, output)
    assert_whole(output)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jax", "torch"])
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, cli.INTERRUPTED), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_told_to_end(number, status, kind, sources, output):
    """From the keyboard, or by a batch system whose time is up: nothing is left."""
    process = started(kind, sources, output / "in/folders", pause=0.01)
    time.sleep(0.1)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == status, error
    assert "Traceback" not in error
    assert not contents(output.parent)


@pytest.mark.slow
def test_two_at_once(sources, output, capsys):
    """One says so, and the other is none the worse."""
    process = started("jax", sources, output, pause=0.005)
    arguments = ("--checkpoint_dir", sources / "jax", "--output_path", output)
    status, _, error = run(capsys, "jax", *arguments)
    is_running = process.poll() is None
    assert status == cli.BAD_INPUT
    assert f"output_path: another run is writing {output}" in error
    assert is_running
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert_whole(output)


@pytest.mark.parametrize("kind", ["jax", "torch"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_interrupted_at_any_write(error, kind, sources, output, monkeypatch):
    (output / "old").mkdir(parents=True)
    before, check = contents(output.parent), convert.writing.check_finite
    function = {"jax": jax_to_pytorch, "torch": pytorch_to_jax}[kind]
    for write in (1, 2, 40):
        calls = iter(range(write))

        def interrupted(*arguments, calls=calls):
            check(*arguments)
            if next(calls, None) is None:
                raise error

        monkeypatch.setattr(convert.writing, "check_finite", interrupted)
        with pytest.raises(error):
            function(sources / kind, output, overwrite=True)
        assert contents(output.parent) == before
    monkeypatch.undo()
    time.sleep(0.2)  # for what might still be written
    assert contents(output.parent) == before


def test_what_was_under_way_does_not_come_back(sources, output, monkeypatch):
    """TensorStore writes in threads of its own, into folders that it makes as it needs them."""
    wait = convert.writing._result
    for number in (3, 20, 60, 100):
        calls = itertools.count()

        def interrupted(future, calls=calls, number=number):
            if next(calls) == number:
                raise KeyboardInterrupt
            return wait(future)

        monkeypatch.setattr(convert.writing, "_result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pytorch_to_jax(sources / "torch", output)
        assert not contents(output.parent)
    time.sleep(0.3)
    assert not contents(output.parent)


@pytest.mark.parametrize("name", ["mkdir", "rename", "unlink"])
@pytest.mark.parametrize("is_done", [False, True], ids=["before", "after"])
def test_interrupted_at_any_step(name, is_done, sources, output, monkeypatch):
    """Of those that make, move and remove folders: the old one is there, or the new one."""
    step = getattr(pathlib.Path, name)
    for number in range(20):
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        (output / "old").touch()
        calls = itertools.count()

        def interrupted(path, *arguments, calls=calls, number=number, **options):
            is_last = path.parent == output.parent and next(calls) == number
            if is_last and not is_done:
                raise KeyboardInterrupt
            step(path, *arguments, **options)
            if is_last:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            patched.setattr(pathlib.Path, name, interrupted)
            jax_to_pytorch(sources / "jax", output, overwrite=True)
            break
        old, new = {"old"}, {"model.safetensors", "config.json", "assets"}
        assert {path.name for path in output.iterdir()} in (old, new)
        jax_to_pytorch(sources / "jax", output, overwrite=True)
        assert_whole(output)
    assert 0 < number < 10


def test_killed_while_the_old_one_stood_aside(sources, output, capsys):
    """Between the two renames: the old one comes back before anything else is done."""
    aside = output.with_name(".converted.replaced")
    aside.mkdir()
    (aside / "weights").write_text("old")
    with pytest.raises(FileExistsError, match="output_path: expected nothing there"):
        jax_to_pytorch(sources / "jax", output)
    assert contents(output.parent) == {"converted": None, "converted/weights": b"old"}
    output.rename(aside)
    converted(capsys, "jax", sources / "jax", output, "--overwrite")
    assert_whole(output)


def test_killed_while_the_old_one_was_removed(sources, output, capsys):
    aside = output.with_name(".converted.replaced")
    aside.mkdir()
    converted(capsys, "jax", sources / "jax", output)
    assert_whole(output)


def test_a_lock_that_was_left(sources, output, capsys):
    output.with_name(".converted.lock").touch()
    converted(capsys, "jax", sources / "jax", output)
    assert_whole(output)


def test_a_lock_that_another_run_has_just_removed(sources, output, monkeypatch):
    """Between the moment in which it was opened and that in which it was taken."""
    take = fcntl.flock

    def too_late(file, operation):
        output.with_name(".converted.lock").unlink()
        take(file, operation)

    monkeypatch.setattr(fcntl, "flock", too_late)
    with pytest.raises(FileExistsError, match="another run is writing"):
        jax_to_pytorch(sources / "jax", output)
    assert not contents(output.parent)


def test_a_file_system_without_locks(sources, output, monkeypatch):
    def unknown(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    jax_to_pytorch(sources / "jax", output)
    assert_whole(output)
