"""Checkpoints on disk: as Orbax and safetensors write them, and damaged ones."""

import json
import pathlib
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.reading import LazyArray, open_checkpoint
from parity_tests.convert.checkpoints import FORMATS, nested, save_orbax
from parity_tests.harness import BACKENDS

orbax_is_installed = pytest.mark.skipif("jax" not in BACKENDS, reason="Orbax needs JAX")

ARRAYS = {
    "PaliGemma/llm/layers/kv_einsum_1/w": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "PaliGemma/img/bias": np.arange(5).astype(ml_dtypes.bfloat16),
    "action_in_proj/kernel": np.zeros((3, 2), dtype=np.float32),
}
formats = pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)


def tree_of(arrays, suffix=""):
    """The nested tree that openpi saves, under "params"."""
    import jax.numpy as jnp

    return nested({f"params/{name}{suffix}": jnp.array(array) for name, array in arrays.items()})


def save_shards(folder):
    """Two safetensors files and their index."""
    files = {"PaliGemma": "model-00001-of-00002.safetensors"}
    weight_map = {
        name: files.get(name.split("/")[0], "model-00002-of-00002.safetensors") for name in ARRAYS
    }
    for file in set(weight_map.values()):
        part = {name: ARRAYS[name] for name in ARRAYS if weight_map[name] == file}
        save_file(part, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def assert_reads(path, expected):
    found = open_checkpoint(path)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert isinstance(found[name], LazyArray)
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
        assert np.asarray(found[name]).dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(found[name]), array)
        np.testing.assert_array_equal(found[name][1], array[1])


@orbax_is_installed
@formats
@pytest.mark.parametrize("suffix", ["", "/value"], ids=["plain", "value"])
def test_orbax(tmp_path, options, suffix):
    tree = tree_of(ARRAYS, suffix)
    folder = save_orbax(tmp_path / "a folder, 100%" / "30000" / "params", tree, **options)
    expected = {f"params/{name}{suffix}": array for name, array in ARRAYS.items()}
    assert_reads(folder, expected)
    assert_reads(str(folder.parent), expected)


@orbax_is_installed
def test_orbax_standard_checkpointer(tmp_path):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", tree_of(ARRAYS))
    assert_reads(tmp_path, {f"params/{name}": array for name, array in ARRAYS.items()})


def test_safetensors_file(tmp_path):
    save_file(ARRAYS, tmp_path / "weights.safetensors")
    assert_reads(tmp_path / "weights.safetensors", ARRAYS)


def test_safetensors_folder(tmp_path):
    save_file(ARRAYS, tmp_path / "model.safetensors")
    assert_reads(tmp_path, ARRAYS)


def test_sharded_safetensors(tmp_path):
    save_shards(tmp_path)
    assert_reads(tmp_path, ARRAYS)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no_such_folder"):
        open_checkpoint(tmp_path / "no_such_folder")


def test_not_a_checkpoint(tmp_path):
    (tmp_path / "notes.txt").write_text("no weights")
    with pytest.raises(ValueError, match=r"expected one checkpoint: .*; got \[\]"):
        open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"notes\.txt: expected a safetensors file"):
        open_checkpoint(tmp_path / "notes.txt")


@orbax_is_installed
def test_two_checkpoints_in_one_folder(tmp_path):
    save_file(ARRAYS, tmp_path / "model.safetensors")
    save_orbax(tmp_path / "params", tree_of(ARRAYS))
    with pytest.raises(ValueError, match=r"expected one checkpoint: .*model\.safetensors.*params"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_truncated_safetensors(tmp_path, kept):
    file = tmp_path / "model.safetensors"
    save_file(ARRAYS, file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a safetensors file"):
        open_checkpoint(tmp_path)


def test_sharded_safetensors_without_a_shard(tmp_path):
    save_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"got none for \['model-00002-of-00002"):
        open_checkpoint(tmp_path)


def test_sharded_safetensors_without_an_array(tmp_path):
    save_shards(tmp_path)
    save_file({"other": np.zeros(1)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"got none for \['action_in_proj/kernel'\]"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}"])
def test_index_without_a_weight_map(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json: expected JSON with a 'weight_map'"):
        open_checkpoint(tmp_path)


@orbax_is_installed
def test_damaged_manifest(tmp_path):
    save_orbax(tmp_path / "params", tree_of(ARRAYS))
    (tmp_path / "params/manifest.ocdbt").write_bytes(b"")
    with pytest.raises(ValueError, match="params: expected an Orbax checkpoint"):
        open_checkpoint(tmp_path)


@orbax_is_installed
@formats
def test_lost_data_is_no_zeros(tmp_path, options):
    noise = {"noise": np.random.default_rng(0).random((64, 64)).astype(np.float32)}
    folder = save_orbax(tmp_path / "params", tree_of(noise), **options)
    chunks = "*/d/*" if options["use_ocdbt"] else "params.noise/[0-9c]*"
    for chunk in list(folder.glob(chunks)):
        shutil.rmtree(chunk) if chunk.is_dir() else chunk.unlink()
    array = open_checkpoint(tmp_path)["params/noise"]
    with pytest.raises(ValueError, match="params/noise: expected a whole array"):
        np.asarray(array)


READ_BARE = """
import sys
import numpy as np
from convert.reading import open_checkpoint
for array in open_checkpoint(sys.argv[1]).values():
    np.asarray(array)
assert not {"jax", "torch", "flax", "orbax"} & sys.modules.keys()
"""


@orbax_is_installed
def test_reading_needs_neither_framework(tmp_path):
    save_orbax(tmp_path / "orbax/params", tree_of(ARRAYS))
    save_file(ARRAYS, tmp_path / "model.safetensors")
    repository = pathlib.Path(__file__).parents[2]
    for path in (tmp_path / "orbax", tmp_path / "model.safetensors"):
        subprocess.run([sys.executable, "-c", READ_BARE, path], cwd=repository, check=True)
