"""Checkpoints for the tests of the converter, and places for its results."""

import shutil

import pytest

from convert import jax_to_pytorch
from parity_tests.cases import TINY_ADAPTED, tiny_config
from parity_tests.convert.checkpoints import jax_tensors, save_jax


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """Good checkpoints by name, which no test changes."""
    folder = tmp_path_factory.mktemp("originals")
    save_jax(folder / "jax", jax_tensors(tiny_config()))
    save_jax(folder / "jax in folders", jax_tensors(tiny_config()), use_ocdbt=False)
    save_jax(folder / "jax adapted", jax_tensors(tiny_config(**TINY_ADAPTED)))
    jax_to_pytorch(folder / "jax", folder / "torch", precision="float32")
    jax_to_pytorch(folder / "jax", folder / "sharded", max_shard_size="300KB")
    jax_to_pytorch(folder / "jax adapted", folder / "adapted", lora="keep")
    return folder


@pytest.fixture
def copy(originals, tmp_path):
    """Copies one of the good checkpoints for a test to damage."""

    def copied(name):
        return shutil.copytree(originals / name, tmp_path / "sources" / name)

    return copied


@pytest.fixture
def output(tmp_path):
    """A place that may be written; its folder has a file that is not ours."""
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/notes.txt").write_text("another's")
    return tmp_path / "outputs/converted"
