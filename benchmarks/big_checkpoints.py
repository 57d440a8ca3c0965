"""Checkpoints of random weights as openpi saves them, of any size, an array at a time.

Float32 normals: their signs and mantissas do not compress, their exponents do, as with trained
weights. Both storages of a checkpoint hold the same numbers.
"""

import concurrent.futures
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tensorstore

from convert import config_file
from convert.writing import array_spec, tree_metadata
from pruner_spec.config import Pi0Config
from pruner_spec.layout import OPENPI_JAX, OPENPI_TORCH

Shape = tuple[int, ...]

CONFIGS = {
    "full": Pi0Config(pi05=True),
    "small": Pi0Config(
        pi05=True,
        paligemma_variant="tiny",
        action_expert_variant="tiny_expert",
        vision_variant="tiny/32",
    ),
}
STORAGES = ("whole", "chunked")

_DEVICES = 8
_SHARDED_FROM = {"full": 4 << 20, "small": 0}  # bytes; openpi leaves smaller arrays whole
_THREADS = 2


def shapes(size: str) -> dict[str, Shape]:
    """The stored arrays, by openpi's names."""
    return {f"params/{name}": shape for name, shape in OPENPI_JAX.shapes(CONFIGS[size]).items()}


def chunk_shape(shape: Shape, storage: str, size: str) -> Shape:
    """What is stored in one piece: all, or a shard of openpi's FSDP on eight devices."""
    is_small = len(shape) < 2 or 4 * math.prod(shape) < _SHARDED_FROM[size]
    if storage == "whole" or is_small:
        return shape
    for axis in map(int, np.argsort(shape)[::-1]):
        if shape[axis] % _DEVICES == 0:
            return (*shape[:axis], shape[axis] // _DEVICES, *shape[axis + 1 :])
    return shape


def count(size: str) -> int:
    """All numbers of a checkpoint."""
    return sum(math.prod(shape) for shape in shapes(size).values())


def largest_tensor(size: str) -> int:
    """Bytes of the largest tensor of the safetensors."""
    return max(4 * math.prod(shape) for shape in OPENPI_TORCH.shapes(CONFIGS[size]).values())


def largest_chunk(storage: str, size: str) -> int:
    """Bytes of the largest piece."""
    return max(4 * math.prod(chunk_shape(each, storage, size)) for each in shapes(size).values())


def write(folder: Path, size: str) -> None:
    """Writes the checkpoint in every storage, into a folder by its name."""
    for storage in STORAGES:
        (folder / storage / "params").mkdir(parents=True)
        config = config_file.write(CONFIGS[size], "float32", ())
        (folder / storage / config_file.NAME).write_bytes(config)
        metadata = json.dumps(tree_metadata(shapes(size)))
        (folder / storage / "params/_METADATA").write_text(metadata)
    stores = {storage: tensorstore.Context() for storage in STORAGES}
    for seed, (name, shape) in enumerate(shapes(size).items()):
        values = _normals(shape, seed)
        for storage, context in stores.items():
            chunks = chunk_shape(shape, storage, size)
            spec = array_spec(folder / storage / "params", name, values.dtype, shape, chunks)
            store = tensorstore.open(spec, context=context, create=True).result()
            store.write(values, can_reference_source_data_indefinitely=True).result()


def _normals(shape: Shape, seed: int) -> np.ndarray:
    """About as large as weights are."""
    values = np.empty(math.prod(shape), np.float32)
    seeds = np.random.SeedSequence(seed).spawn(_THREADS)

    def fill(part: np.ndarray, seed: np.random.SeedSequence) -> None:
        np.random.default_rng(seed).standard_normal(dtype=np.float32, out=part)
        part *= 0.02

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(fill, np.array_split(values, _THREADS), seeds))
    return values.reshape(shape)


def bytes_in(folder: Path) -> int:
    """What a folder's files take on disk, holes not counted."""
    return sum(512 * path.stat().st_blocks for path in folder.rglob("*") if path.is_file())


def compression(sizes: Mapping[str, int], size: str) -> dict[str, float]:
    """Bytes on disk a byte of the arrays, by storage."""
    return {storage: sizes[storage] / (4 * count(size)) for storage in STORAGES}


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2])
