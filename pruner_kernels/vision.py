"""What stands between the products of a vision block: a row or a tile of rows a program.

768 rows of SigLIP's 1152 bfloat16 are 1.7 MiB, which are read from the L2 cache and written to it.
A bias is of a product that a library left without it.
"""

import triton.language as tl

from pruner_kernels.language import gelu, jit


@jit
def add_layer_norm(
    x, y, bias, scale, shift, total, normed, x_stride, y_stride,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """x + y + bias of a row, and its layer norm."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < WIDTH
    a = tl.load(x + row * x_stride + i, mask=inside, other=0)
    b = tl.load(y + row * y_stride + i, mask=inside, other=0).to(tl.float32)
    if HAS_BIAS:
        b += tl.load(bias + i, mask=inside, other=0).to(tl.float32)
    added = (a.to(tl.float32) + b).to(a.dtype)
    tl.store(total + row * WIDTH + i, added, mask=inside)
    z = added.to(tl.float32)  # rounded where the plain path rounds
    z = tl.where(inside, z - tl.sum(z, axis=0) / WIDTH, 0)
    z *= tl.rsqrt(tl.sum(z * z, axis=0) / WIDTH + EPSILON)
    z *= tl.load(scale + i, mask=inside, other=0).to(tl.float32)
    z += tl.load(shift + i, mask=inside, other=0).to(tl.float32)
    tl.store(normed + row * WIDTH + i, z.to(a.dtype), mask=inside)


@jit
def gelu_bias(
    x, bias, out, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """gelu(x + bias), a tile a program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    place = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    y = tl.load(x + place, mask=inside, other=0).to(tl.float32)
    y += tl.load(bias + column, mask=column < WIDTH, other=0).to(tl.float32)[None, :]
    tl.store(out + place, gelu(y).to(out.dtype.element_ty), mask=inside)


@jit
def split_bias(
    x, bias, query, key, value, rows,
    SCALE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x + bias, of a packed projection, in three; a tile of one of them a program.

    Queries are scaled by SCALE before they are rounded.
    """
    part = tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    wide_row = row.to(tl.int64)[:, None]
    packed = x + part * WIDTH + wide_row * (3 * WIDTH) + column[None, :]
    y = tl.load(packed, mask=inside, other=0).to(tl.float32)
    added = tl.load(bias + part * WIDTH + column, mask=column < WIDTH, other=0)
    y += added.to(tl.float32)[None, :]
    to = value
    if part == 0:
        to = query
        y *= SCALE
    elif part == 1:
        to = key
    tl.store(to + wide_row * WIDTH + column[None, :], y.to(query.dtype.element_ty), mask=inside)
