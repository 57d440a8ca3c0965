"""What is written, against the released models: names, shapes, dtypes, and their strict loader."""

import pathlib

import numpy as np
import pytest
from etils import epath

from convert import folders, jax_to_pytorch
from convert.mapping import Side, groups
from convert.safetensors_file import metadata, open_safetensors
from convert.writing import SafetensorsSink
from parity_tests import reference
from parity_tests.cases import tiny_config
from parity_tests.convert.checkpoints import jax_tensors, save_jax, torch_tensors
from parity_tests.harness import BACKENDS
from pruner_spec.config import Pi0Config
from pruner_spec.layout import OPENPI_JAX, OPENPI_TORCH

UNUSED = OPENPI_TORCH.unused[0]
FULL = {"pi05_full": Pi0Config(pi05=True), "pi0_full": Pi0Config()}

full_size = pytest.mark.parametrize("table", FULL)


def released(table):
    """Shape and dtype by name, from openpi's own model."""
    path = pathlib.Path(reference.__file__).parent / f"torch_params_{table}.tsv"
    dtypes = {
        line.split("\t")[0]: line.split("\t")[2]
        for line in path.read_text().splitlines()
        if not line.startswith("#")
    }
    shapes = reference.shapes(f"torch_params_{table}")
    return {name: (shape, dtypes[name]) for name, shape in shapes.items()}


@full_size
def test_full_size_files_have_the_released_names_shapes_and_dtypes(table, tmp_path):
    """The header of a file of 7 GB, which is a hole but for it."""
    tensors = folders.torch_tensors(FULL[table], "bfloat16")
    sink = SafetensorsSink(tmp_path, "model", tensors, folders.naming("openpi")[1])
    sink.close()
    path = epath.Path(tmp_path / "model.safetensors")
    found = {
        name: (array.shape, array.dtype.name) for name, array in open_safetensors(path).items()
    }
    for alias, name in metadata(path).items():
        if name in found:
            found[alias] = found[name]
    assert found == released(table)


@full_size
def test_every_tensor_of_both_sides_is_in_one_group(table):
    source, target = (Side(each, FULL[table]) for each in (OPENPI_JAX, OPENPI_TORCH))
    for side, rows in ((source, "sources"), (target, "targets")):
        named = [
            name
            for group in groups(source, target)
            for row in getattr(group, rows)
            for name in row.names(side.config)
        ]
        assert len(named) == len(set(named))
        assert set(named) == side.layout.shapes(side.config).keys()


@pytest.mark.skipif(len(BACKENDS) < 2, reason="Orbax needs JAX, and the loader PyTorch")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_openpis_strict_loader_takes_the_result(precision, tmp_path):
    """A module with the released names and the tied table, and `safetensors.torch.load_model`."""
    import torch
    from safetensors.torch import load_model

    config = tiny_config()
    source = save_jax(tmp_path / "jax", jax_tensors(config))
    jax_to_pytorch(source, tmp_path / "torch", precision=precision)
    model = module_of(OPENPI_TORCH.shapes(config) | {UNUSED: (1024, 56)})
    [(alias, name)] = OPENPI_TORCH.aliases.items()
    put(model, alias, model.get_parameter(name))
    load_model(model, tmp_path / "torch/model.safetensors", strict=True)
    dtypes = folders.torch_tensors(config, precision)
    for name, tensor in torch_tensors(config).items():
        wanted = torch.from_numpy(np.array(tensor, order="C"))
        rounded = wanted.to(getattr(torch, dtypes[name][0].name)).to(torch.float32)
        assert torch.equal(model.get_parameter(name), rounded), name
    assert model.get_parameter(alias) is model.get_parameter(OPENPI_TORCH.aliases[alias])


def module_of(shapes):
    """A module whose parameters have these names."""
    import torch

    root = torch.nn.Module()
    for name, shape in shapes.items():
        put(root, name, torch.nn.Parameter(torch.full(shape, torch.nan)))
    return root


def put(root, name, parameter):
    import torch

    *parents, last = name.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, torch.nn.Module())
        root = getattr(root, parent)
    root.register_parameter(last, parameter)


@pytest.mark.skipif(len(BACKENDS) < 2, reason="Orbax needs JAX, and the model PyTorch")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_our_drop_in_takes_the_result(precision, tmp_path):
    """As the README has it: `PI0Pytorch` and `load_model`, strict."""
    from safetensors.torch import load_model

    from pruner_torch import PI0Pytorch

    config = tiny_config(dtype=precision)
    source = save_jax(tmp_path / "jax", jax_tensors(config))
    jax_to_pytorch(source, tmp_path / "torch", precision=precision)
    model = PI0Pytorch(config, seed=1)
    load_model(model, tmp_path / "torch/model.safetensors", strict=True)
    expected = BACKENDS["torch"].module("checkpoint").load(tmp_path / "torch", config)
    for (name, found), wanted in zip(
        model.pi0.named_parameters(), expected.parameters(), strict=True
    ):
        assert (found == wanted).all(), name
