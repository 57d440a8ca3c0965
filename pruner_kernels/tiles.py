"""How the kernels cut their work: fixed by size, so that a start needs no measurements.

Who wants them has a few others timed on the GPU at hand, and the fastest used from then on in this
process (`tune_product`, `tune_attention`): before what they cut is compiled or captured.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

PROCESSORS = 132  # of an H100 or H200; on others the tiles are the same, and so are the bits
HOPPER = 227 << 10  # bytes that a program may have for itself; 163 KiB on an A100, 99 on others
COUNTERS = 4096  # the most tiles that a launch may share among programs

logger = logging.getLogger(__name__)


def cdiv(size: int, block: int) -> int:
    """How many blocks hold `size`."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The smallest that holds `size`."""
    return 1 << (size - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a product of few rows is cut.

    Attributes:
        columns: of the kernel, a program.
        inner: inputs, a turn of the loop.
        parts: programs that share a tile's inputs.
        warps, stages: Triton's.
    """

    columns: int
    inner: int = 128
    parts: int = 1
    warps: int = 4
    stages: int = 4


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


# By kernel, for up to 64 rows in half precision: the fastest of those that were tried on an H200,
# or within 3 % of it.
TILES = {
    "project": Tiles(columns=32),
    "gated": Tiles(columns=64, inner=64, stages=6),
    "merge": Tiles(columns=32, parts=4),
}
# What is timed beside them: the next best on an H200 (benchmarks/results/kernel_tiles_2026-11-26),
# and smaller ones, for GPUs with less shared memory.
CANDIDATES = {
    "project": (
        Tiles(columns=32, inner=64, stages=6),
        Tiles(columns=32, warps=8),
        Tiles(columns=32, inner=64, warps=8, stages=6),
        Tiles(columns=16, stages=3),
    ),
    "gated": (
        Tiles(columns=64, warps=8),
        Tiles(columns=64),
        Tiles(columns=32),
        Tiles(columns=64, inner=64, warps=8, stages=6),
    ),
    "merge": (
        Tiles(columns=32, inner=64, parts=4, stages=6),
        Tiles(columns=16, parts=4),
        Tiles(columns=16, parts=2),
        Tiles(columns=16, inner=64, parts=4, stages=6),
    ),
}
ATTENTION_CANDIDATES = (
    AttentionTiles(16, parts=3, stages=1),
    AttentionTiles(16, parts=5, stages=1),
    AttentionTiles(16, parts=4, stages=3),
    AttentionTiles(16, keys=32, parts=4, warps=4),
    AttentionTiles(16, keys=32, parts=8, warps=4, stages=3),
)

# A kernel's name; of a product its block of rows, inputs, outputs and bytes of an element, of
# attention the samples, rows, keys and bytes.
Key = tuple[str, int, int, int, int]
_AnyTiles = TypeVar("_AnyTiles", Tiles, AttentionTiles)
_products: dict[Key, Tiles] = {}
_attention: dict[Key, AttentionTiles] = {}


def tune(
    table: dict[Key, _AnyTiles],
    key: Key,
    candidates: Sequence[_AnyTiles],
    seconds: Callable[[], float],
) -> None:
    """Tries candidates in a key's place, and leaves the fastest there; what is there stays.

    Args:
        table: of what was tuned.
        key: see `Key`.
        candidates: one that fails (for want of shared memory, say) is left out; where all do, the
            table stays as it is.
        seconds: how long what reads the table takes now.
    """
    if key in table or len(candidates) < 2:
        return
    times: dict[_AnyTiles, float] = {}
    try:
        for tiles in dict.fromkeys(candidates):
            table[key] = tiles
            try:
                times[tiles] = seconds()
            except Exception as error:  # a compiler's, a driver's: another candidate may run
                logger.debug("%s: %s fails, %s", key, tiles, error)
    finally:
        del table[key]
    if not times:
        logger.warning("%s: none of the tiles that were tried runs", key)
        return
    table[key] = min(times, key=lambda tiles: times[tiles])
    said = ", ".join(f"{1e6 * taken:.1f} µs {tiles}" for tiles, taken in times.items())
    logger.debug("%s: %s of %s", key, table[key], said)


def row_block(rows: int) -> int:
    """Rows of a tile: a power of two, at least the tensor cores' 16."""
    return min(max(power_of_two(rows), 16), 128)


def product_tiles(
    name: str, rows: int, inputs: int, outputs: int, itemsize: int, shared: int = HOPPER
) -> Tiles:
    """How `rows.project`, `rows.gated` or `rows.merge` is cut.

    Args:
        name: of the kernel.
        rows: of x.
        inputs, outputs: of the kernel that it reads.
        itemsize: bytes of an element.
        shared: bytes that a program may have for itself.
    """
    found = _products.get((name, row_block(rows), inputs, outputs, itemsize))
    return found or _fitting(TILES[name], rows, inputs, outputs, itemsize, shared)


def tune_product(
    name: str,
    rows: int,
    inputs: int,
    outputs: int,
    itemsize: int,
    shared: int,
    seconds: Callable[[], float],
) -> None:
    """Has `product_tiles` give the fastest from now on; see `tune` for `seconds`."""
    candidates = [
        _fitting(tiles, rows, inputs, outputs, itemsize, shared)
        for tiles in (TILES[name], *CANDIDATES[name])
    ]
    key = (name, row_block(rows), inputs, outputs, itemsize)
    tune(_products, key, candidates, seconds)


def _fitting(
    tiles: Tiles, rows: int, inputs: int, outputs: int, itemsize: int, shared: int
) -> Tiles:
    """Tiles for half precision and 64 rows, as these sizes can have them."""
    block = row_block(rows)
    if itemsize > 2 or block > 64:
        # Twice the registers and bytes a tile: half the inputs at a time.
        tiles = dataclasses.replace(tiles, inner=tiles.inner // 2, warps=8)
    stage = tiles.inner * (block + tiles.columns) * itemsize
    stages = max(min(tiles.stages, (shared - (8 << 10)) // stage), 2)
    parts, count = tiles.parts, cdiv(outputs, tiles.columns) * cdiv(rows, block)
    while parts > 1 and (inputs % parts or inputs // parts < tiles.inner or count > COUNTERS):
        parts //= 2
    return dataclasses.replace(tiles, stages=stages, parts=parts)


def attention_tiles(
    batch: int, rows: int, keys: int, itemsize: int, shared: int = HOPPER
) -> AttentionTiles:
    """How `attention.attend` is cut: small tiles, so that every multiprocessor has one.

    Args:
        batch: samples.
        rows: (token, head) pairs of a sample.
        keys: that they attend to.
        itemsize: bytes of an element.
        shared: bytes that a program may have for itself.
    """
    found = _attention.get(("attend", batch, rows, keys, itemsize))
    if found is not None:
        return found
    if itemsize > 2 or shared < 160 << 10:
        return AttentionTiles(16, keys=16)
    tiles = batch * cdiv(rows, 16)
    parts = min(PROCESSORS // tiles, cdiv(keys, 64), 5)
    if parts:
        return AttentionTiles(16, parts=parts)
    return AttentionTiles(64, keys=32, warps=4, stages=3)


def tune_attention(
    batch: int, rows: int, keys: int, itemsize: int, shared: int, seconds: Callable[[], float]
) -> None:
    """Has `attention_tiles` give the fastest from now on; see `tune` for `seconds`."""
    # Without tensor cores a larger tile overflows the registers.
    others = ATTENTION_CANDIDATES if itemsize <= 2 else ()
    candidates = (attention_tiles(batch, rows, keys, itemsize, shared), *others)
    tune(_attention, ("attend", batch, rows, keys, itemsize), candidates, seconds)


def score_tiles(task: int, width: int, itemsize: int) -> dict[str, int]:
    """How `pruner.logits` is cut.

    Args:
        task: tokens.
        width: of a token.
        itemsize: bytes of an element.
    """
    # 20 tiles of 16 rows a camera, 3 cameras, twice 32 of 64 tasks: each reads 192 KiB from L2.
    return {
        "ROWS": 16,
        "COLUMNS": min(max(power_of_two(task), 16), 32),
        "INNER": min(max(power_of_two(width), 16), 256 if itemsize == 2 else 128),
    }


def weight_columns(task: int) -> int:
    """Of the other patches, how many `pruner.scores` takes a turn; `task` as in `score_tiles`."""
    return 64 if task <= 64 else 32  # beside the weights of all tasks, in registers


def has_patch_tiles(images: int, itemsize: int) -> bool:
    """Whether `vision.attend_patches` is faster than a library's attention; of these images."""
    return images <= 8 and itemsize == 2


def patch_tiles(patches: int, head_dim: int) -> dict[str, int]:
    """How `vision.attend_patches` is cut, of an image and of a head."""
    most = max(power_of_two(head_dim + 1) // 2, 16)
    rest = max(power_of_two(max(head_dim - most, 1)), 16)
    tile = min(max(power_of_two(patches), 16), 64)
    return {"ROWS": tile, "KEYS": tile, "MOST": most, "REST": rest}


def election_tiles(patches: int) -> dict[str, int]:
    """How `pruner.elect` is cut: rows of the scores of so many patches, a turn."""
    block = max(power_of_two(patches), 16)
    # 16384 scores at a time are 64 registers a thread.
    return {"ROWS": min(max(16384 // block, 4), 64), "BLOCK": block}
