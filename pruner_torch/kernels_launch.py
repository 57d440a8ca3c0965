"""Launches of `pruner_kernels`'s kernels: results are allocated, tiles chosen, strides passed on.

Names and arguments are those of `kernels`, whose checks have passed.
"""

import functools

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pruner_kernels import attention, pointwise, rows
from pruner_kernels.few_rows import packed_shape
from pruner_kernels.tiles import (
    COUNTERS,
    HOPPER,
    Tiles,
    attention_tiles,
    cdiv,
    power_of_two,
    product_tiles,
    row_block,
)
from pruner_torch.float8 import Quantized
from pruner_torch.kernels_float8 import product
from pruner_torch.kernels_plain import Rows

STREAMS = 64  # that have counters of their own: 1 MiB
_counters: dict[torch.device, Tensor] = {}
_streams: dict[torch.device, dict[int, int]] = {}


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have for itself."""
    if device.type != "cuda":
        return HOPPER
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _counters_of(device: torch.device) -> Tensor:
    """The current stream's zeros, which every launch leaves as zeros.

    Launches that share counters must not run at the same time: a stream has its own, and a CUDA
    graph those of the stream it was captured on; so graphs captured on one stream must not be
    replayed on two at once.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if device not in _counters:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("call the kernels once before they are captured")
        _counters[device] = torch.zeros((STREAMS, COUNTERS), dtype=torch.int32, device=device)
        if device.type == "cuda":  # once: another stream may be the next to use them
            torch.cuda.current_stream(device).synchronize()
    streams = _streams.setdefault(device, {})
    return _counters[device][streams.setdefault(stream, len(streams) % STREAMS)]


def _tiles(name: str, x: Tensor, inputs: int, outputs: int) -> Tiles:
    return product_tiles(name, len(x), inputs, outputs, x.itemsize, shared_memory(x.device))


def _cut(tiles: Tiles, x: Tensor) -> dict[str, int]:
    """The constants of a product of few rows, and Triton's."""
    return {
        "ROWS": row_block(len(x)),
        "COLUMNS": tiles.columns,
        "INNER": tiles.inner,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _parts(squares: Tensor) -> dict[str, int]:
    return {"PARTS": len(squares), "PARTS_BLOCK": power_of_two(len(squares))}


def _squares(parts: int, x: Tensor) -> Float[Tensor, "P R"]:
    return torch.empty((parts, len(x)), dtype=torch.float32, device=x.device)


def add_scaled(
    x: Float[Tensor, "R D"],
    added: Float[Tensor, "R D"] | None,
    gate: Float[Tensor, "D"] | None,
    scale: Float[Tensor, "D"],
) -> Rows:
    """x + added * gate, as a norm takes it; `kernels.scale_rows` where nothing is added."""
    width = x.shape[1]
    block = power_of_two(width)
    out = x if added is None else x.new_empty(x.shape)
    scaled, squares = x.new_empty(x.shape), _squares(1, x)
    other = x if added is None else added
    pointwise.add_scaled[(len(x),)](
        x, other, gate, scale, out, scaled, squares, x.stride(0), other.stride(0),
        WIDTH=width, HAS_SUM=added is not None, HAS_GATE=gate is not None, BLOCK=block,
        num_warps=min(max(block // 256, 1), 8),
    )  # fmt: skip
    return Rows(out, scaled, squares)


def project(
    given: Rows,
    kernel: Float[Tensor, "D N"],
    added: Float[Tensor, "N"] | None,
    cos: Float[Tensor, "B S half"],
    sin: Float[Tensor, "B S half"],
    key: Float[Tensor, "B T G H"],
    value: Float[Tensor, "B T G H"],
    place: int,
    num_heads: int,
) -> Float[Tensor, "B S K H"]:
    """`kernels.project`, of few rows."""
    (batch, length), (groups, head_dim) = cos.shape[:2], key.shape[2:]
    x, (inputs, outputs) = given.scaled, kernel.shape
    tiles = _tiles("project", x, inputs, outputs)
    query = x.new_empty(batch, length, num_heads, head_dim)
    grid = (outputs // tiles.columns, cdiv(len(x), row_block(len(x))))
    rows.project[grid](
        x, given.squares, kernel, added, cos, sin, query, key, value, len(x), length, place,
        x.stride(0), *cos.stride()[:2], *sin.stride()[:2], *query.stride()[:3], *key.stride()[:3],
        *value.stride()[:3], QUERIES=num_heads, KEYS=groups, HALF=head_dim // 2, INPUTS=inputs,
        **_parts(given.squares), HAS_ADDED=added is not None,
        **_cut(tiles, x),
    )  # fmt: skip
    return query


def rotate(
    given: Rows,
    kernel: Float[Tensor, "D N"],
    added: Float[Tensor, "N"] | None,
    cos: Float[Tensor, "B S half"],
    sin: Float[Tensor, "B S half"],
    key: Float[Tensor, "B T G H"],
    value: Float[Tensor, "B T G H"],
    place: int,
    num_heads: int,
) -> Float[Tensor, "B S K H"]:
    """`kernels.project`, around a library's product."""
    (batch, length), (groups, head_dim) = cos.shape[:2], key.shape[2:]
    qkv = (given.scaled @ kernel).view(batch, length, -1)
    query = qkv.new_empty(batch, length, num_heads, head_dim)
    pointwise.rotate[(batch * length,)](
        qkv, given.squares, added, cos, sin, query, key, value, batch * length, length, place,
        *qkv.stride()[:2], *cos.stride()[:2], *sin.stride()[:2], *query.stride()[:3],
        *key.stride()[:3], *value.stride()[:3],
        QUERIES=num_heads, KEYS=groups, HALF=head_dim // 2, INPUTS=len(kernel),
        **_parts(given.squares), HAS_ADDED=added is not None,
        HEADS_BLOCK=power_of_two(num_heads + 2 * groups), HALF_BLOCK=power_of_two(head_dim // 2),
        num_warps=4,
    )  # fmt: skip
    return query


def gated(
    given: Rows, kernel: Float[Tensor, "D 2*F"], added: Float[Tensor, "2*F"] | None
) -> Float[Tensor, "R F"]:
    """`kernels.gated`, of few rows."""
    x, inputs, outputs = given.scaled, len(kernel), kernel.shape[1] // 2
    tiles = _tiles("gated", x, inputs, 2 * outputs)
    out = x.new_empty(len(x), outputs)
    grid = (cdiv(2 * outputs, tiles.columns), cdiv(len(x), row_block(len(x))))
    rows.gated[grid](
        x, given.squares, kernel, added, out, len(x), x.stride(0),
        INPUTS=inputs, OUTPUTS=outputs, **_parts(given.squares), HAS_ADDED=added is not None,
        **_cut(tiles, x),
    )  # fmt: skip
    return out


def gelu_product(
    given: Rows, kernel: Float[Tensor, "D 2*F"] | Quantized, added: Float[Tensor, "2*F"] | None
) -> Float[Tensor, "R F"]:
    """`kernels.gated`, around a library's product."""
    gate_up = product(given.scaled, kernel)
    count, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(count, width)
    # 8 elements, 16 bytes, a thread of each half: 4 programs a row of F = 4096, 16 of 16384.
    block = min(power_of_two(width), 1024)
    pointwise.gelu_product[(count, cdiv(width, block))](
        gate_up, given.squares, added, out, count, gate_up.stride(0),
        WIDTH=width, INPUTS=kernel.shape[0], **_parts(given.squares),
        HAS_ADDED=added is not None, BLOCK=block, num_warps=max(block // 256, 1),
    )  # fmt: skip
    return out


def merge(
    x: Float[Tensor, "R F"],
    kernel: Float[Tensor, "F D"],
    residual: Float[Tensor, "R D"],
    gate: Float[Tensor, "D"] | None,
    scale: Float[Tensor, "D"],
) -> Rows:
    """`kernels.merge`, of few rows."""
    inputs, outputs = kernel.shape
    tiles, block = _tiles("merge", x, inputs, outputs), row_block(len(x))
    blocks = (cdiv(outputs, tiles.columns), cdiv(len(x), block))
    out, scaled = x.new_empty(len(x), outputs), x.new_empty(len(x), outputs)
    squares = _squares(blocks[0], x)
    # 4 parts of 64 × 1024 float32 are 1 MiB, which does not leave the L2 cache.
    area = blocks[0] * blocks[1] * tiles.parts * block * tiles.columns if tiles.parts > 1 else 1
    partials = torch.empty(area, dtype=torch.float32, device=x.device)
    rows.merge[(blocks[0], tiles.parts, blocks[1])](
        x, kernel, residual, gate, scale, _counters_of(x.device), out, scaled, squares,
        partials, len(x), x.stride(0), residual.stride(0), INPUTS=inputs, OUTPUTS=outputs,
        HAS_GATE=gate is not None, PARTS=tiles.parts,
        **_cut(tiles, x),
    )  # fmt: skip
    return Rows(out, scaled, squares)


def attend(
    query: Float[Tensor, "B S K H"],
    key: Float[Tensor, "B T 1 H"],
    value: Float[Tensor, "B T 1 H"],
    key_mask: Bool[Tensor, "B T"] | None,
    packed: bool = False,
) -> Tensor:
    """`kernels.attend`."""
    batch, length, heads, head_dim = query.shape
    keys, device = key.shape[1], query.device
    tiles = attention_tiles(batch, length * heads, keys, query.itemsize, shared_memory(device))
    span = cdiv(cdiv(keys, tiles.parts), tiles.keys) * tiles.keys
    parts = cdiv(keys, span)  # none is empty
    width = max(power_of_two(head_dim), 16)
    blocks = cdiv(length * heads, tiles.rows)
    width_out = heads * head_dim
    packing = packed_shape(batch * length, width_out)
    out = query.new_empty(packing if packed else (batch, length, width_out))
    shared = batch * blocks * parts * tiles.rows if parts > 1 else 1
    tops, sums, totals = (
        torch.empty(size, dtype=torch.float32, device=device)
        for size in (shared, shared, shared * width)
    )
    attention.attend[(blocks, parts, batch)](
        query, key, value, key_mask, out, tops, sums, totals, _counters_of(device),
        length, keys, span, *query.stride()[:3], *key.stride()[:2], *value.stride()[:2],
        *((0, 0) if key_mask is None else key_mask.stride()),
        HEADS=heads, HEAD_DIM=head_dim, HAS_MASK=key_mask is not None,
        ROWS=tiles.rows, KEYS=tiles.keys, WIDTH=width, PARTS=parts,
        PACKED=packing[2] if packed else 0, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out


def embed_actions(
    noisy: Float[Tensor, "R A"],
    kernel: Float[Tensor, "A E"],
    bias: Float[Tensor, "E"],
    scale: Float[Tensor, "E"],
    dtype: torch.dtype,
) -> Rows:
    """`kernels.embed_actions`."""
    actions, width = kernel.shape
    shape, noisy = (len(noisy), width), noisy.contiguous()
    x, scaled = (torch.empty(shape, dtype=dtype, device=noisy.device) for _ in range(2))
    squares = _squares(1, noisy)
    rows.embed_actions[(len(noisy),)](
        noisy, kernel, bias, scale, x, scaled, squares,
        WIDTH=width, ACTIONS=actions, ACTIONS_BLOCK=power_of_two(actions),
        BLOCK=power_of_two(width), num_warps=8,
    )  # fmt: skip
    return Rows(x, scaled, squares)


def euler_step(
    given: Rows,
    scale: Float[Tensor, "E"],
    shift: Float[Tensor, "E"] | None,
    kernel: Float[Tensor, "E A"],
    bias: Float[Tensor, "A"],
    noisy: Float[Tensor, "B H A"],
    step: float,
) -> Float[Tensor, "B H A"]:
    """`kernels.euler_step`."""
    (batch, horizon, actions), width = noisy.shape, given.x.shape[1]
    out = torch.empty_like(noisy)
    rows.euler_step[(batch * horizon,)](
        given.x.contiguous(), given.squares, scale, shift, kernel, bias, noisy, out,
        len(given.x), step,
        WIDTH=width, ACTIONS=actions, ACTIONS_BLOCK=power_of_two(actions),
        LENGTH=len(given.x) // batch, HORIZON=horizon, **_parts(given.squares),
        INNER=min(power_of_two(width), 1024), HAS_SHIFT=shift is not None, num_warps=8,
    )  # fmt: skip
    return out
