"""How the kernels cut their work: fixed by size, so that a start needs no measurements."""

import dataclasses

PROCESSORS = 132  # of an H100 or H200; on others the tiles are the same, and so are the bits
HOPPER = 227 << 10  # bytes that a program may have for itself; 163 KiB on an A100, 99 on others
COUNTERS = 4096  # the most tiles that a launch may share among programs


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
    tiles, block = TILES[name], row_block(rows)
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
    if itemsize > 2 or shared < 160 << 10:
        return AttentionTiles(16, keys=16)
    tiles = batch * cdiv(rows, 16)
    parts = min(PROCESSORS // tiles, cdiv(keys, 64), 5)
    if parts:
        return AttentionTiles(16, parts=parts)
    return AttentionTiles(64, keys=32, warps=4, stages=3)
