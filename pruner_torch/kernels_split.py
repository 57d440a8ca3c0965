"""Triton: work that several programs share because one a tile would leave most of the GPU idle.

Each leaves its part in memory and counts itself in; the one that finds itself last adds up the
parts in their order, so that the result does not depend on who came last, and sets the count back
to 0 for the next launch. Launches that share counters must not run at the same time: a stream has
its own, and a CUDA graph those of the stream it was captured on; so graphs captured on one stream
must not be replayed on two at once.
"""

import math

import torch
import triton.language as tl
from torch import Tensor

from pruner_spec.sequence import MASKED_LOGIT
from pruner_torch.kernels_pointwise import begin, jit, launch
from pruner_torch.kernels_rows import dot, line, prefetch, weights
from pruner_torch.kernels_tiles import (
    AttentionTiles,
    attention_tiles,
    cdiv,
    power_of_two,
    row_block,
    tiles_of,
)

STREAMS, COUNTERS = 64, 4096  # 1 MiB; the most tiles that a launch may split
MASKED = tl.constexpr(MASKED_LOGIT)
LOG2_E = tl.constexpr(1.4426950408889634)
_counters: dict[torch.device, Tensor] = {}
_streams: dict[torch.device, dict[int, int]] = {}


def counters_of(device: torch.device) -> Tensor:
    """The current stream's zeros, which every launch leaves as zeros."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if device not in _counters:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("call the kernels once before they are captured")
        _counters[device] = torch.zeros((STREAMS, COUNTERS), dtype=torch.int32, device=device)
        if device.type == "cuda":  # once: another stream may be the next to use them
            torch.cuda.current_stream(device).synchronize()
    streams = _streams.setdefault(device, {})
    return _counters[device][streams.setdefault(stream, len(streams) % STREAMS)]


@jit
def is_last(counter, PARTS: tl.constexpr):
    """Whether all other parts of a tile are in memory; once true, the counter is 0 again."""
    # What all threads have stored is there before one of them counts, and is read after.
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == PARTS - 1
    if last:
        tl.store(counter, 0)
    return last


@jit
def _write(
    total, kernel_scale, residual, gate, out, row, rows, column, residual_stride,
    OUTPUTS: tl.constexpr, HAS_GATE: tl.constexpr, HAS_KERNEL_SCALE: tl.constexpr,
):  # fmt: skip
    is_column = column < OUTPUTS
    if HAS_KERNEL_SCALE:
        total *= tl.load(kernel_scale + column, mask=is_column, other=0)[None, :]
    if HAS_GATE:
        total *= tl.load(gate + column, mask=is_column, other=0).to(tl.float32)[None, :]
    inside = (row < rows)[:, None] & is_column[None, :]
    place = residual + row[:, None] * residual_stride + column[None, :]
    total += tl.load(place, mask=inside, other=0).to(tl.float32)
    to = out + row[:, None] * OUTPUTS + column[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=inside)


@jit
def _linear_residual(
    x, kernel, kernel_scale, residual, gate, out, partials, counters, rows,
    x_stride, in_stride, out_stride, residual_stride,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_KERNEL_SCALE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PARTS: tl.constexpr,
    LINE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    SPAN: tl.constexpr = INPUTS // PARTS
    EVEN: tl.constexpr = SPAN % INNER == 0 and OUTPUTS % COLUMNS == 0
    if LINE > 0:
        prefetch(kernel, part * SPAN, column, in_stride, out_stride, SPAN, LINE, OVERLAP)
    begin(OVERLAP)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, SPAN, INNER):
        local = start + tl.arange(0, INNER)
        k = part * SPAN + local
        inside = (local < SPAN)[:, None] & (column < OUTPUTS)[None, :]
        w = weights(kernel, k, column, inside, in_stride, out_stride, EVEN)
        is_input = (row < rows)[:, None] & (local < SPAN)[None, :]
        a = tl.load(x + row[:, None] * x_stride + k[None, :], mask=is_input, other=0)
        total = dot(a, w.to(a.dtype), total)

    if PARTS == 1:
        _write(
            total, kernel_scale, residual, gate, out, row, rows, column, residual_stride,
            OUTPUTS, HAS_GATE, HAS_KERNEL_SCALE,
        )  # fmt: skip
    else:
        tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        AREA: tl.constexpr = ROWS * COLUMNS
        i = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        mine = partials + tile * (PARTS * AREA) + i
        tl.store(mine + part * AREA, total)
        if is_last(counters + tile, PARTS):
            total = tl.load(mine, cache_modifier=".cg")
            for other in tl.static_range(1, PARTS):
                total += tl.load(mine + other * AREA, cache_modifier=".cg")
            _write(
                total, kernel_scale, residual, gate, out, row, rows, column, residual_stride,
                OUTPUTS, HAS_GATE, HAS_KERNEL_SCALE,
            )  # fmt: skip


def linear_residual(
    x: Tensor, kernel: Tensor, residual: Tensor, gate: Tensor | None, kernel_scale: Tensor | None
) -> Tensor:
    """`kernels.linear_residual`."""
    rows, (inputs, outputs) = x.shape[0], kernel.shape
    block = row_block(rows, False)
    tiles = tiles_of("linear_residual", block, kernel)
    parts = tiles.parts
    blocks = (cdiv(outputs, tiles.columns), cdiv(rows, block))
    while parts > 1 and (inputs % parts or inputs // parts < tiles.inner):
        parts //= 2
    if math.prod(blocks) > COUNTERS:
        parts = 1
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    # 4 parts of 64 × 1024 float32 are 1 MiB, which does not leave the L2 cache.
    area = math.prod(blocks) * parts * block * tiles.columns if parts > 1 else 1
    partials = torch.empty(area, dtype=torch.float32, device=x.device)
    _linear_residual[(blocks[0], parts, blocks[1])](
        x, kernel, kernel_scale, residual, gate, out, partials, counters_of(x.device), rows,
        x.stride(0), *kernel.stride(), residual.stride(0), INPUTS=inputs, OUTPUTS=outputs,
        HAS_GATE=gate is not None, HAS_KERNEL_SCALE=kernel_scale is not None,
        ROWS=block, COLUMNS=tiles.columns, INNER=tiles.inner, PARTS=parts,
        LINE=line(kernel, inputs // parts),
        num_warps=tiles.warps, num_stages=tiles.stages, **launch(),
    )  # fmt: skip
    return out


@jit
def _attend(
    query, key, value, mask, out, tops, sums, totals, counters, length, keys, span,
    query_batch, query_token, query_head, key_batch, key_token, value_batch, value_token,
    mask_batch, mask_token,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Softmax attention of rows (token, head) to a span of the keys, in base 2.

    `top` is a row's largest logit so far, `sum` that of its exponentials, `total` the values'.
    """
    begin(OVERLAP)
    batch = tl.program_id(2).to(tl.int64)
    part = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < length * HEADS
    h = tl.arange(0, WIDTH)
    is_h = h < HEAD_DIM
    place = query + batch * query_batch + row // HEADS * query_token + row % HEADS * query_head
    q = tl.load(place[:, None] + h[None, :], mask=is_row[:, None] & is_h[None, :], other=0)

    # Every span has a key, masked or not: after the first turn a row's top is finite.
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    sum = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(part * span, tl.minimum(part * span + span, keys), KEYS):
        t = start + tl.arange(0, KEYS)
        is_key = t < keys
        inside = is_key[:, None] & is_h[None, :]
        of_key = key + batch * key_batch + t[:, None] * key_token + h[None, :]
        k = tl.load(of_key, mask=inside, other=0)
        of_value = value + batch * value_batch + t[:, None] * value_token + h[None, :]
        v = tl.load(of_value, mask=inside, other=0)
        logits = dot(q, k.T, tl.zeros((ROWS, KEYS), tl.float32)) * LOG2_E
        if HAS_MASK:
            of_mask = mask + batch * mask_batch + t * mask_token
            visible = tl.load(of_mask, mask=is_key, other=0) != 0
            logits = tl.where(visible[None, :], logits, MASKED)
        logits = tl.where(is_key[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        fade = tl.exp2(top - new_top)
        weight = tl.exp2(logits - new_top[:, None])
        sum = sum * fade + tl.sum(weight, axis=1)
        total = dot(weight.to(v.dtype), v, total * fade[:, None])
        top = new_top

    to = out + (batch * length * HEADS + row)[:, None] * HEAD_DIM + h[None, :]
    written = is_row[:, None] & is_h[None, :]
    if PARTS == 1:
        tl.store(to, (total / sum[:, None]).to(out.dtype.element_ty), mask=written)
    else:
        tile = batch * tl.num_programs(0) + tl.program_id(0)
        i = tile * (PARTS * ROWS) + tl.arange(0, ROWS)
        j = i[:, None] * WIDTH + h[None, :]
        tl.store(tops + i + part * ROWS, top)
        tl.store(sums + i + part * ROWS, sum)
        tl.store(totals + j + part * (ROWS * WIDTH), total)
        if is_last(counters + tile, PARTS):
            top = tl.load(tops + i, cache_modifier=".cg")
            for other in tl.static_range(1, PARTS):
                top = tl.maximum(top, tl.load(tops + i + other * ROWS, cache_modifier=".cg"))
            sum = tl.zeros((ROWS,), tl.float32)
            total = tl.zeros((ROWS, WIDTH), tl.float32)
            for other in tl.static_range(PARTS):
                fade = tl.exp2(tl.load(tops + i + other * ROWS, cache_modifier=".cg") - top)
                sum += fade * tl.load(sums + i + other * ROWS, cache_modifier=".cg")
                theirs = tl.load(totals + j + other * (ROWS * WIDTH), cache_modifier=".cg")
                total += fade[:, None] * theirs
            tl.store(to, (total / sum[:, None]).to(out.dtype.element_ty), mask=written)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    tiles: AttentionTiles | None = None,
) -> Tensor:
    """`kernels.attend`."""
    batch, length, heads, head_dim = query.shape
    keys = key.shape[1]
    tiles = tiles or attention_tiles(length * heads, keys, query)
    span = cdiv(cdiv(keys, tiles.parts), tiles.keys) * tiles.keys
    parts = cdiv(keys, span)  # none is empty
    width = max(power_of_two(head_dim), 16)
    blocks = cdiv(length * heads, tiles.rows)
    out = torch.empty((batch, length, heads * head_dim), dtype=query.dtype, device=query.device)
    shared = batch * blocks * parts * tiles.rows if parts > 1 else 1
    tops, sums, totals = (
        torch.empty(size, dtype=torch.float32, device=query.device)
        for size in (shared, shared, shared * width)
    )
    # Two stages of keys and values and the queries: 160 KiB of Hopper's 227 at 64 × 64 × 256.
    _attend[(blocks, parts, batch)](
        query, key, value, key_mask, out, tops, sums, totals, counters_of(query.device),
        length, keys, span, *query.stride()[:3], *key.stride()[:2], *value.stride()[:2],
        *((0, 0) if key_mask is None else key_mask.stride()),
        HEADS=heads, HEAD_DIM=head_dim, HAS_MASK=key_mask is not None,
        ROWS=tiles.rows, KEYS=tiles.keys, WIDTH=width, PARTS=parts,
        num_warps=tiles.warps, num_stages=tiles.stages, **launch(),
    )  # fmt: skip
    return out
