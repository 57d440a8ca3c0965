"""Triton: products of few rows with a large kernel, as the denoising steps have them.

A kernel may lie in memory either way. [inputs, outputs] as the model stores it gives each program
of 32 columns segments of 64 bytes; a transposed copy, `kernel.T.contiguous().T`, made once when the
weights are folded, gives it segments of `2 * inner` bytes, whole cache lines at any tile.

The norm costs no launch and no pass of its own. With r = 1 / rms(x), a row's norm times a kernel is
r · ((x · scale) kernel) + shift kernel: the squares are summed while the rows go by, r multiplies
the result, and the shift is the tile's last row, which no row of x needs. So x · scale and the
shift are rounded one by one, where the plain path rounds their sum.

Where launches overlap, a program asks for its weights while it waits for the rows.
"""

import math

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs

from pruner_torch.gemma import RMS_EPSILON
from pruner_torch.kernels_pointwise import begin, gelu, jit, launch, turn
from pruner_torch.kernels_tiles import cdiv, row_block, tiles_of

EPSILON = tl.constexpr(RMS_EPSILON)
# The interpreter's product of bfloat16 is wrong; that of float32 is right.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@jit
def dot(a, b, total):
    """total + a · b, in float32 from the operands as they are."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")


@jit
def weights(kernel, k, column, inside, in_stride, out_stride, EVEN: tl.constexpr):
    """A tile of a kernel. Nothing reads it again before the next step: first to leave the cache."""
    place = kernel + k[:, None] * in_stride + column[None, :] * out_stride
    if EVEN:
        w = tl.load(place, eviction_policy="evict_first")
    else:
        w = tl.load(place, mask=inside, other=0.0, eviction_policy="evict_first")
    return w


@jit
def prefetch(
    kernel, start, column, in_stride, out_stride,
    SPAN: tl.constexpr, LINE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Asks the L2 cache for a program's weights of inputs from `start` on, SPAN a power of two.

    LINE inputs of an output are a cache line where the kernel is transposed; 1 otherwise.
    """
    if OVERLAP:
        k = start + tl.arange(0, SPAN // LINE) * LINE
        if LINE == 1:
            place = kernel + k * in_stride + tl.min(column, axis=0) * out_stride
        else:
            place = kernel + k[:, None] * in_stride + column[None, :] * out_stride
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [place.to(tl.int64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


def line(kernel: Tensor, span: int) -> int:
    """Of `prefetch`; 0 for none at all."""
    if span & (span - 1):
        return 0
    return min(128 // kernel.itemsize, span) if kernel.stride(0) == 1 else 1


@jit
def _scaled(
    x, scale, shift, row, is_row, is_shift, k, x_stride,
    INPUTS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    """Rows times the scale, in x's dtype, the shift as the last; and the sums of x's squares."""
    inside = k < INPUTS
    place = x + row[:, None] * x_stride + k[None, :]
    loaded = tl.load(place, mask=is_row[:, None] & inside[None, :], other=0)
    values = loaded.to(tl.float32)
    squares = tl.sum(values * values, axis=1)
    if HAS_SCALE:
        values *= tl.load(scale + k, mask=inside, other=0)[None, :]
    if HAS_SHIFT:
        added = tl.load(shift + k, mask=inside, other=0)
        values = tl.where(is_shift[:, None], added[None, :], values)
    return values.to(loaded.dtype), squares


@jit
def _normalized(total, factor, is_shift, kernel_scale, column, is_column,
                HAS_SHIFT: tl.constexpr, HAS_KERNEL_SCALE: tl.constexpr):  # fmt: skip
    """Of a tile of products: each row times its factor, plus the shift's row."""
    y = total * factor[:, None]
    if HAS_SHIFT:
        y += tl.sum(tl.where(is_shift[:, None], total, 0), axis=0)[None, :]
    if HAS_KERNEL_SCALE:
        y *= tl.load(kernel_scale + column, mask=is_column, other=0)[None, :]
    return y


@jit
def _normed_linear(
    x, scale, shift, kernel, kernel_scale, out, rows, x_stride, in_stride, out_stride,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_KERNEL_SCALE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
    LINE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    local = tl.arange(0, ROWS)
    row = tl.program_id(1) * (ROWS - HAS_SHIFT) + local
    is_row = (row < rows) & (local < ROWS - HAS_SHIFT)
    is_shift = local == ROWS - 1
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < OUTPUTS
    EVEN: tl.constexpr = INPUTS % INNER == 0 and OUTPUTS % COLUMNS == 0
    if LINE > 0:
        prefetch(kernel, 0, column, in_stride, out_stride, INPUTS, LINE, OVERLAP)
    begin(OVERLAP)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, INPUTS, INNER):
        k = start + tl.arange(0, INNER)
        inside = (k < INPUTS)[:, None] & is_column[None, :]
        w = weights(kernel, k, column, inside, in_stride, out_stride, EVEN)
        a, more = _scaled(
            x, scale, shift, row, is_row, is_shift, k, x_stride, INPUTS, HAS_SCALE, HAS_SHIFT
        )
        total = dot(a, w.to(a.dtype), total)
        squares += more
    factor = tl.rsqrt(squares / INPUTS + EPSILON)
    y = _normalized(
        total, factor, is_shift, kernel_scale, column, is_column, HAS_SHIFT, HAS_KERNEL_SCALE
    )
    to = out + row[:, None] * OUTPUTS + column[None, :]
    tl.store(to, y.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def normed_linear(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    kernel: Tensor,
    kernel_scale: Tensor | None,
) -> Tensor:
    """`kernels.normed_linear`."""
    rows, outputs = x.shape[0], kernel.shape[1]
    block = row_block(rows, shift is not None)
    tiles = tiles_of("normed_linear", block, kernel)
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    grid = (cdiv(outputs, tiles.columns), cdiv(rows, block - (shift is not None)))
    _normed_linear[grid](
        x, scale, shift, kernel, kernel_scale, out, rows, x.stride(0), *kernel.stride(),
        INPUTS=x.shape[1], OUTPUTS=outputs, HAS_SCALE=scale is not None,
        HAS_SHIFT=shift is not None, HAS_KERNEL_SCALE=kernel_scale is not None,
        ROWS=block, COLUMNS=tiles.columns, INNER=tiles.inner,
        LINE=line(kernel, x.shape[1]), num_warps=tiles.warps, num_stages=tiles.stages, **launch(),
    )  # fmt: skip
    return out


@jit
def _normed_pair(
    x, scale, shift, kernel, kernel_scale, row, is_row, is_shift, first, second, is_column,
    x_stride, in_stride, out_stride,
    INPUTS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    HAS_KERNEL_SCALE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    INNER: tl.constexpr, LINE: tl.constexpr, OVERLAP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """What `_normed_linear` computes, of two tiles of columns, in float32."""
    if LINE > 0:
        prefetch(kernel, 0, first, in_stride, out_stride, INPUTS, LINE, OVERLAP)
        prefetch(kernel, 0, second, in_stride, out_stride, INPUTS, LINE, OVERLAP)
    begin(OVERLAP)
    one = tl.zeros((ROWS, COLUMNS), tl.float32)
    two = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, INPUTS, INNER):
        k = start + tl.arange(0, INNER)
        inside = (k < INPUTS)[:, None] & is_column[None, :]
        v = weights(kernel, k, first, inside, in_stride, out_stride, EVEN)
        w = weights(kernel, k, second, inside, in_stride, out_stride, EVEN)
        a, more = _scaled(
            x, scale, shift, row, is_row, is_shift, k, x_stride, INPUTS, HAS_SCALE, HAS_SHIFT
        )
        one = dot(a, v.to(a.dtype), one)
        two = dot(a, w.to(a.dtype), two)
        squares += more
    factor = tl.rsqrt(squares / INPUTS + EPSILON)
    one = _normalized(
        one, factor, is_shift, kernel_scale, first, is_column, HAS_SHIFT, HAS_KERNEL_SCALE
    )
    two = _normalized(
        two, factor, is_shift, kernel_scale, second, is_column, HAS_SHIFT, HAS_KERNEL_SCALE
    )
    return one, two


@jit
def _normed_gated(
    x, scale, shift, kernel, kernel_scale, out, rows, x_stride, in_stride, out_stride,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_KERNEL_SCALE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
    LINE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    local = tl.arange(0, ROWS)
    row = tl.program_id(1) * (ROWS - HAS_SHIFT) + local
    is_row = (row < rows) & (local < ROWS - HAS_SHIFT)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < OUTPUTS
    EVEN: tl.constexpr = INPUTS % INNER == 0 and OUTPUTS % COLUMNS == 0
    gate, up = _normed_pair(
        x, scale, shift, kernel, kernel_scale, row, is_row, local == ROWS - 1,
        column, OUTPUTS + column, is_column, x_stride, in_stride, out_stride,
        INPUTS, HAS_SCALE, HAS_SHIFT, HAS_KERNEL_SCALE, ROWS, COLUMNS, INNER, LINE, OVERLAP,
        EVEN,
    )  # fmt: skip
    y = gelu(gate) * up
    to = out + row[:, None] * OUTPUTS + column[None, :]
    tl.store(to, y.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def normed_gated(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    gate_up: Tensor,
    kernel_scale: Tensor | None,
) -> Tensor:
    """`kernels.normed_gated`."""
    rows, outputs = x.shape[0], gate_up.shape[1] // 2
    block = row_block(rows, shift is not None)
    tiles = tiles_of("normed_pair", block, gate_up)
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    grid = (cdiv(outputs, tiles.columns), cdiv(rows, block - (shift is not None)))
    _normed_gated[grid](
        x, scale, shift, gate_up, kernel_scale, out, rows, x.stride(0), *gate_up.stride(),
        INPUTS=x.shape[1], OUTPUTS=outputs, HAS_SCALE=scale is not None,
        HAS_SHIFT=shift is not None, HAS_KERNEL_SCALE=kernel_scale is not None,
        ROWS=block, COLUMNS=tiles.columns, INNER=tiles.inner,
        LINE=line(gate_up, x.shape[1]), num_warps=tiles.warps, num_stages=tiles.stages, **launch(),
    )  # fmt: skip
    return out


@jit
def _normed_rotated(
    x, scale, shift, kernel, kernel_scale, cos, sin, query, key, value, rows, length,
    x_stride, in_stride, out_stride, cos_batch, cos_token, sin_batch, sin_token,
    query_batch, query_token, query_head, key_batch, key_token, key_head,
    value_batch, value_token, value_head,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HALF: tl.constexpr, INPUTS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_KERNEL_SCALE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
    LINE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program computes columns of a head's first half, and those they are turned with."""
    local = tl.arange(0, ROWS)
    row = tl.program_id(1) * (ROWS - HAS_SHIFT) + local
    is_row = (row < rows) & (local < ROWS - HAS_SHIFT)
    head = tl.program_id(0) // (HALF // COLUMNS)
    i = tl.program_id(0) % (HALF // COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)
    column = head * (2 * HALF) + i
    first, second = _normed_pair(
        x, scale, shift, kernel, kernel_scale, row, is_row, local == ROWS - 1,
        column, column + HALF, i < HALF, x_stride, in_stride, out_stride, INPUTS,
        HAS_SCALE, HAS_SHIFT, HAS_KERNEL_SCALE, ROWS, COLUMNS, INNER, LINE, OVERLAP,
        INPUTS % INNER == 0,
    )  # fmt: skip
    batch, token = (row // length).to(tl.int64), row % length
    c = cos + (batch * cos_batch + token * cos_token)[:, None] + i[None, :]
    s = sin + (batch * sin_batch + token * sin_token)[:, None] + i[None, :]
    turns = is_row[:, None] & (head < QUERIES + KEYS)
    first, second = turn(
        first, second, tl.load(c, mask=turns, other=1), tl.load(s, mask=turns, other=0)
    )
    if head < QUERIES:
        to = query + batch * query_batch + token * query_token + head * query_head
    elif head < QUERIES + KEYS:
        to = key + batch * key_batch + token * key_token + (head - QUERIES) * key_head
    else:
        to = value + batch * value_batch + token * value_token
        to += (head - QUERIES - KEYS) * value_head
    to = to[:, None] + i[None, :]
    tl.store(to, first.to(query.dtype.element_ty), mask=is_row[:, None])
    tl.store(to + HALF, second.to(query.dtype.element_ty), mask=is_row[:, None])


def normed_rotated(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    kernel: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    out_query: Tensor,
    out_key: Tensor,
    out_value: Tensor,
    kernel_scale: Tensor | None,
) -> None:
    """`kernels.normed_rotated`; half a head is a multiple of 16."""
    _, length, groups, head_dim = out_key.shape
    rows, half = x.shape[0], head_dim // 2
    block = row_block(rows, shift is not None)
    tiles = tiles_of("normed_rotated", block, kernel)
    columns = math.gcd(tiles.columns, half)
    heads = num_heads + 2 * groups
    grid = (heads * (half // columns), cdiv(rows, block - (shift is not None)))
    _normed_rotated[grid](
        x, scale, shift, kernel, kernel_scale, cos, sin, out_query, out_key, out_value,
        rows, length, x.stride(0), *kernel.stride(), *cos.stride()[:2], *sin.stride()[:2],
        *out_query.stride()[:3], *out_key.stride()[:3], *out_value.stride()[:3],
        QUERIES=num_heads, KEYS=groups, HALF=half, INPUTS=x.shape[1],
        HAS_SCALE=scale is not None, HAS_SHIFT=shift is not None,
        HAS_KERNEL_SCALE=kernel_scale is not None, ROWS=block, COLUMNS=columns, INNER=tiles.inner,
        LINE=line(kernel, x.shape[1]), num_warps=tiles.warps, num_stages=tiles.stages, **launch(),
    )  # fmt: skip
