"""Places that cannot be written, or must not: refused, leaving all as it was."""

import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

import convert.output
from parity_tests.cases import tiny_config
from parity_tests.convert.checkpoints import (
    jax_tensors,
    save_jax,
    save_torch,
    torch_tensors,
)
from parity_tests.convert.commands import converted, named_in, refused, run
from parity_tests.harness import BACKENDS

pytestmark = pytest.mark.skipif("jax" not in BACKENDS, reason="Orbax needs JAX")

PI05 = tiny_config()


def test_no_output(originals, capsys):
    for kind in ("jax", "torch"):
        status, printed, error = run(capsys, kind, "--checkpoint_dir", originals / kind)
        assert (status, printed) == (2, "")
        assert "output_path: expected a folder to write, or --inspect_only; got neither" in error


def test_something_there(originals, output, capsys):
    output.mkdir()
    (output / "precious.txt").write_text("a year's work")
    file = output.parent / "notes.txt"
    for kind in ("jax", "torch"):
        for place in (output, file):
            message = refused(capsys, kind, originals / kind, place)
            assert message == f"output_path: expected nothing there, or --overwrite; got {place}"


@pytest.mark.parametrize("kind", ["jax", "torch"])
def test_something_there_that_is_replaced(kind, originals, output, capsys):
    (output / "old").mkdir(parents=True)
    (output / "old/weights").write_text("old")
    file = output.parent / "notes.txt"
    for place in (output, file):
        converted(capsys, kind, originals / kind, place, "--overwrite")
        found = {path.name for path in place.iterdir()}
        weights = {"model.safetensors"} if kind == "jax" else {"params"}
        assert found == {"config.json", "assets"} | weights
    assert {path.name for path in output.parent.iterdir()} == {"converted", "notes.txt"}


def test_an_empty_folder_gives_way(originals, output, capsys):
    output.mkdir()
    converted(capsys, "jax", originals / "jax", output)
    assert (output / "model.safetensors").exists()


def test_a_link_is_followed(originals, output, capsys):
    """To the disk that it names, where there is room."""
    (output.parent / "disk").mkdir()
    output.symlink_to(output.parent / "disk")
    converted(capsys, "jax", originals / "jax", output)
    assert output.is_symlink()
    assert (output.parent / "disk/model.safetensors").exists()


@pytest.mark.parametrize("kind", ["jax", "torch"])
def test_what_is_replaced_stays_if_the_conversion_fails(kind, tmp_path, output, capsys):
    output.mkdir()
    (output / "weights").write_text("old")
    tensors = {"jax": jax_tensors, "torch": torch_tensors}[kind](PI05)
    last = sorted(tensors)[-1]
    tensors[last] = np.full_like(tensors[last], np.nan)
    source = {"jax": save_jax, "torch": save_torch}[kind](tmp_path / "checkpoint", tensors)
    named_in(refused(capsys, kind, source, output, "--overwrite"), ["expected finite weights"])
    assert (output / "weights").read_text() == "old"


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        *(("jax", place) for place in ("jax", "jax/params", "jax/params/converted", ".", "link")),
        *(("torch", place) for place in ("torch", "torch/model.safetensors", ".")),
    ],
)
@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=["", "overwrite"])
def test_the_sources_place(kind, place, flags, copy, capsys):
    """With --overwrite, a conversion would delete what it reads."""
    source = copy(kind)
    (source.parent / "link").symlink_to(source)
    output = source.parent / place
    message = refused(capsys, kind, source, output, *flags)
    named_in(message, ["output_path: expected a place outside of", "got"])


def test_the_sources_place_under_another_name(copy, capsys):
    source = copy("jax")
    (source.parent / "link").symlink_to(source)
    message = refused(capsys, "jax", source.parent / "link", source, "--overwrite")
    named_in(message, ["output_path: expected a place outside of"])


def test_the_current_folder(originals, tmp_path, capsys, monkeypatch):
    (tmp_path / "here/below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here/below")
    for place in (".", ".."):
        arguments = ("--checkpoint_dir", originals / "jax", "--output_path", place, "--overwrite")
        status, _, error = run(capsys, "jax", *arguments)
        assert status == 2
        assert "output_path: expected a folder below" in error
    assert (tmp_path / "here/below").exists()


def test_a_mounted_folder(originals, output, capsys, monkeypatch):
    """Which cannot be moved: better said at once than when all is converted."""
    output.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: pathlib.Path(path) == output)
    message = refused(capsys, "jax", originals / "jax", output)
    named_in(message, ["output_path: expected", "where a file system is mounted", str(output)])


def test_a_place_that_is_not_on_this_machine(originals, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("--checkpoint_dir", originals / "jax", "--output_path", "gs://bucket/converted")
    status, _, error = run(capsys, "jax", *arguments)
    assert status == 2
    assert "output_path: expected a folder on this machine, got gs:/" in error
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way(originals, output, capsys):
    place = output.parent / "notes.txt/converted"
    for kind in ("jax", "torch"):
        message = refused(capsys, kind, originals / kind, place)
        named_in(message, ["output_path: expected a folder above", "notes.txt"])


def test_a_place_that_cannot_be(originals, capsys, monkeypatch):
    arguments = ("--checkpoint_dir", originals / "jax", "--output_path", "/proc/no/such/place")
    status, _, error = run(capsys, "jax", *arguments)
    assert status == 2
    assert "output_path: expected" in error
    monkeypatch.setattr(convert.output, "check_space", lambda path, size: None)
    status, _, error = run(capsys, "jax", *arguments)
    assert status == 2
    assert "output_path: expected to be able to write /proc/no/such/place, got" in error


@pytest.mark.skipif(os.geteuid() == 0, reason="may write everywhere")
def test_a_place_that_is_not_ours(originals, output, capsys):
    output.parent.chmod(0o500)
    message = refused(capsys, "jax", originals / "jax", output / "below")
    output.parent.chmod(0o700)
    named_in(message, ["output_path: expected to be able to write", "Permission denied"])


def test_no_space(originals, output, capsys, monkeypatch):
    usage = shutil._ntuple_diskusage(10**12, 10**12, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for kind in ("jax", "torch"):
        message = refused(capsys, kind, originals / kind, output)
        assert message == f"output_path: expected 0.1 GB free for {output}, got 0.0 GB"


LIMITED = """
import resource, sys
from convert import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
getattr(cli, sys.argv[1])(["--checkpoint_dir", sys.argv[2], "--output_path", sys.argv[3]])
"""


@pytest.mark.parametrize(
    ("command", "kind"),
    [("convert_jax_model_to_pytorch", "jax"), ("convert_pytorch_model_to_jax", "torch")],
)
def test_space_that_runs_out(command, kind, originals, tmp_path):
    """As when others fill the disk meanwhile: a limit of the process's, which fails alike."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, command, originals / kind, tmp_path / "new/folder/out"],
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert f"output_path: expected room to write {tmp_path}/new/folder/out, got" in done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
