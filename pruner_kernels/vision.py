"""What stands between the products of a vision block: a row or a tile of rows a program.

768 rows of SigLIP's 1152 bfloat16 are 1.7 MiB, which are read from the L2 cache and written to it.
A bias is of a product that a library left without it.
"""

import triton.language as tl

from pruner_kernels.language import LOG2_E, dot, gelu, jit


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
def elements(
    qkv, bias, row, count, k,
    WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Elements k of rows of a head, with their bias."""
    inside = (row < count)[:, None] & (k < HEAD_DIM)[None, :]
    x = tl.load(qkv + row[:, None] * (3 * WIDTH) + k[None, :], mask=inside, other=0)
    if HAS_BIAS:
        added = tl.load(bias + k, mask=k < HEAD_DIM, other=0).to(tl.float32)
        x = (x.to(tl.float32) + added[None, :]).to(x.dtype)
    return x


@jit
def attend_patches(
    qkv, bias, out, count,
    SCALE: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, MOST: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Softmax attention of a tile of an image's patches to all of them, of one head, in base 2.

    Of a packed projection: heads of queries, of keys, of values. A head's elements are cut in MOST
    and the REST, so that 72 are products of 64 and 16, not of 128; SCALE is of the queries.
    """
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    qkv += image * count * (3 * WIDTH) + head * HEAD_DIM
    of_query, of_key, of_value = bias, bias, bias
    if HAS_BIAS:
        of_query = bias + head * HEAD_DIM
        of_key, of_value = of_query + WIDTH, of_query + 2 * WIDTH
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m, r = tl.arange(0, MOST), MOST + tl.arange(0, REST)
    q = elements(qkv, of_query, row, count, m, WIDTH, HEAD_DIM, HAS_BIAS)
    q_rest = elements(qkv, of_query, row, count, r, WIDTH, HEAD_DIM, HAS_BIAS)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    sum = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, MOST), tl.float32)
    total_rest = tl.zeros((ROWS, REST), tl.float32)
    for start in range(0, count, KEYS):
        j = start + tl.arange(0, KEYS)
        k = elements(qkv + WIDTH, of_key, j, count, m, WIDTH, HEAD_DIM, HAS_BIAS)
        k_rest = elements(qkv + WIDTH, of_key, j, count, r, WIDTH, HEAD_DIM, HAS_BIAS)
        v = elements(qkv + 2 * WIDTH, of_value, j, count, m, WIDTH, HEAD_DIM, HAS_BIAS)
        v_rest = elements(qkv + 2 * WIDTH, of_value, j, count, r, WIDTH, HEAD_DIM, HAS_BIAS)
        logits = dot(q_rest, k_rest.T, dot(q, k.T, tl.zeros((ROWS, KEYS), tl.float32)))
        logits = tl.where((j < count)[None, :], logits * (SCALE * LOG2_E), float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        fade = tl.exp2(top - new_top)
        weight = tl.exp2(logits - new_top[:, None])
        sum = sum * fade + tl.sum(weight, axis=1)
        total = dot(weight.to(v.dtype), v, total * fade[:, None])
        total_rest = dot(weight.to(v.dtype), v_rest, total_rest * fade[:, None])
        top = new_top
    to = out + image * count * WIDTH + head * HEAD_DIM + row[:, None] * WIDTH
    inside = (row < count)[:, None]
    total, total_rest = (total / sum[:, None]).to(q.dtype), (total_rest / sum[:, None]).to(q.dtype)
    tl.store(to + m[None, :], total, mask=inside & (m < HEAD_DIM)[None, :])
    tl.store(to + r[None, :], total_rest, mask=inside & (r < HEAD_DIM)[None, :])


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
