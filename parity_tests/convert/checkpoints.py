"""Checkpoints on disk, as others write them."""

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

from pruner_spec import layout
from pruner_spec.layout import OPENPI_JAX, OPENPI_TORCH
from pruner_spec.parameters import random_parameters

STATS = {
    name: {
        "mean": [0.1, -0.2],
        "std": [1.5, 0.5],
        "q01": [-2.0, -1.0],
        "q99": [2.5, 1.0],
    }
    for name in ("state", "actions")
}

# Options of Orbax, by what they make.
FORMATS = {
    "OCDBT": {"use_ocdbt": True},
    "OCDBT, zarr 3": {"use_ocdbt": True, "use_zarr3": True},
    "folders": {"use_ocdbt": False},
    "folders, zarr 3": {"use_ocdbt": False, "use_zarr3": True},
}


def save_orbax(folder, tree, **options):
    """A nested tree as Orbax saves it; returns the folder."""
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(folder, tree)
    return folder


def nested(flat):
    """A tree from names joined by "/"."""
    tree = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def jax_tensors(config, dtype=np.float32, seed=3):
    """Random weights by openpi's names."""
    named = {name: array.astype(dtype) for name, array in random_parameters(config, seed)}
    return dict(layout.from_named(named, config, OPENPI_JAX))


def torch_tensors(config, dtype=np.float32, seed=3):
    """The same weights by openpi's PyTorch names, without the alias."""
    named = {name: array.astype(dtype) for name, array in random_parameters(config, seed)}
    tensors = dict(layout.from_named(named, config, OPENPI_TORCH))
    return {name: tensors[name] for name in OPENPI_TORCH.shapes(config)}


def save_jax(folder, tensors, suffix="", stats=True, **options):
    """A checkpoint in openpi's layout; returns its folder."""
    tree = nested({f"params/{name}{suffix}": array for name, array in tensors.items()})
    save_orbax(folder / "params", tree, **options)
    if stats:
        save_stats(folder)
    return folder


def save_torch(folder, tensors, stats=True, config=None):
    """A checkpoint as openpi's PyTorch trainer saves it; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", {"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if stats:
        save_stats(folder)
    return folder


def save_stats(folder: pathlib.Path):
    """Statistics of one asset."""
    path = folder / "assets/trossen/norm_stats.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"norm_stats": STATS}))
