"""How the Triton kernels cut their work: fixed by size, so that a start needs no measurements.

A product of few rows takes as long as its kernel takes to arrive from memory, so each weight is
read once, by one program, while all multiprocessors read. 50 rows are one tile of 64: every program
reads them all, from the L2 cache. A layer of π0.5's action expert in bfloat16, at the 4.3 TB/s of
an H200:

| product | kernel | MB | µs | programs × (kernel + rows) KB each |
|---|---|---|---|---|
| q, k, v | 1024 × 2560 | 5.2 | 1.2 | 80 × (64 + 100) |
| out | 2048 × 1024 | 4.2 | 1.0 | 32 tiles × 4 parts × (32 + 50) |
| gate, up | 1024 × 8192 | 16.8 | 3.9 | 128 × (128 + 100) |
| down | 4096 × 1024 | 8.4 | 2.0 | 32 tiles × 4 parts × (64 + 100) |
"""

import dataclasses
import functools
from collections.abc import Callable

import torch
import triton
from torch import Tensor

PROCESSORS = 132  # of an H100 or H200; on others the tiles are the same, and so are the bits


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have for itself: 227 KiB on Hopper, 163 on an A100, 99 on others."""
    if device.type != "cuda":
        return 227 << 10
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def cdiv(size: int, block: int) -> int:
    """How many blocks hold `size`."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The smallest that holds `size`."""
    return 1 << (size - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a product is cut.

    Attributes:
        columns: of the output, a program; of each half where it computes two.
        inner: inputs, a turn of the loop.
        parts: programs that share a tile's inputs.
        warps, stages: Triton's.
    """

    columns: int
    inner: int
    parts: int = 1
    warps: int = 4
    stages: int = 4


# By product, for up to 64 rows. Loads of the next stages are under way while one is multiplied: 3
# stages of 128 inputs are 48 KiB of weights, where 20 KiB a multiprocessor fill the memory's pipe.
TILES = {
    "normed_linear": Tiles(columns=32, inner=128),
    "normed_pair": Tiles(columns=32, inner=128, warps=8),
    "normed_rotated": Tiles(columns=16, inner=128),
    "linear_residual": Tiles(columns=32, inner=128, parts=4),
}
# What `kernels.autotune` tries beside them.
CANDIDATES = {
    "normed_linear": [Tiles(16, 128), Tiles(16, 256, stages=3), Tiles(64, 64), Tiles(32, 64)],
    "normed_pair": [Tiles(16, 128), Tiles(16, 128, warps=8), Tiles(32, 64, warps=8)],
    "normed_rotated": [Tiles(16, 128, warps=8), Tiles(16, 64), Tiles(32, 64, warps=8)],
    "linear_residual": [Tiles(32, 64, 4), Tiles(64, 64, 8), Tiles(32, 128, 8), Tiles(16, 128, 2)],
}
_tuned: dict[tuple[str, int, int, int], Tiles] = {}


def tiles_of(product: str, block: int, kernel: Tensor) -> Tiles:
    """The tiles of a product with `block` rows."""
    inputs, outputs = kernel.shape
    found = _tuned.get((product, block, inputs, outputs))
    if found is not None:
        return found
    tiles = TILES[product]
    if kernel.dtype == torch.float32 or block > 64:
        # Twice the registers and bytes a tile: half the inputs at a time.
        tiles = dataclasses.replace(tiles, inner=tiles.inner // 2, warps=8)
    width = tiles.columns if product in ("normed_linear", "linear_residual") else 2 * tiles.columns
    stage = tiles.inner * (block + width) * max(kernel.itemsize, 2)
    stages = (shared_memory(kernel.device) - (8 << 10)) // stage
    return dataclasses.replace(tiles, stages=max(min(tiles.stages, stages), 2))


def tune(product: str, rows: int, shifted: bool, kernel: Tensor, run: Callable[[], object]) -> None:
    """Times the candidates of a product on `run`, which calls it; keeps the fastest."""
    block = row_block(rows, shifted)
    key = (product, block, kernel.shape[0], kernel.shape[1])
    times = {}
    for tiles in [tiles_of(product, block, kernel), *CANDIDATES[product]]:
        _tuned[key] = tiles
        try:
            # Out of the caches, as in a step, which goes through more weights than they hold.
            times[tiles] = triton.testing.do_bench(run, 5, 30, return_mode="median")
        except triton.runtime.OutOfResources:  # of shared memory, on a smaller GPU
            continue
    _tuned[key] = min(times, key=lambda tiles: times[tiles])


def tuned() -> dict[tuple[str, int, int, int], Tiles]:
    """What was found to be fastest: (product, rows of a tile, inputs, outputs) to its tiles."""
    return dict(_tuned)


def row_block(rows: int, shifted: bool) -> int:
    """Rows of a tile: a power of two with room for the shift, at least the tensor cores' 16."""
    return min(max(power_of_two(rows + shifted), 16), 128)


@dataclasses.dataclass(frozen=True)
class AttentionTiles:
    """How attention is cut.

    Attributes:
        rows: (token, head) pairs of a program.
        keys: a turn of the loop.
        parts: programs that share a tile's keys.
        warps, stages: Triton's.
    """

    rows: int
    keys: int = 64
    parts: int = 1
    warps: int = 8
    stages: int = 2


def attention_tiles(rows: int, keys: int, query: Tensor) -> AttentionTiles:
    """The smallest tile of rows that still lets every multiprocessor have one; parts if none does.

    50 tokens of 8 heads are 25 tiles of 16. Each program reads all keys and values of its part, 64
    KiB a turn of 64 keys at head_dim 256, so up to 4 programs share the keys of a tile.
    """
    # Without tensor cores a larger tile overflows the registers; without Hopper's or an A100's
    # shared memory two stages of 64 keys and values do not fit.
    small = query.dtype == torch.float32 or shared_memory(query.device) < 160 << 10
    for block in (16, 32):
        tiles = query.shape[0] * cdiv(rows, block)
        parts = min(PROCESSORS // tiles, cdiv(keys, 64), 4)
        if small or parts:
            return AttentionTiles(block, keys=16 if small else 64, parts=max(parts, 1))
    return AttentionTiles(64)
