"""What stands around a library's products of many rows, a row or a token a program.

Each reads its input once and writes its output once. The norm before a product is applied after
it, as `pruner_kernels.rows` explains: x · scale goes into the product, r and the shift's product
are applied to what comes out.
"""

import triton.language as tl

from pruner_kernels.language import gelu, jit, load_squares, norm_factor, turn


@jit
def add_scaled(
    x, y, gate, scale, out, scaled, squares, x_stride, y_stride,
    WIDTH: tl.constexpr, HAS_SUM: tl.constexpr, HAS_GATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x + y · gate, which with HAS_SUM is written; that times the scale; the sum of its squares."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < WIDTH
    total = tl.load(x + row * x_stride + i, mask=inside, other=0)
    if HAS_SUM:
        added = tl.load(y + row * y_stride + i, mask=inside, other=0).to(tl.float32)
        if HAS_GATE:
            added *= tl.load(gate + i, mask=inside, other=0).to(tl.float32)
        total = (total.to(tl.float32) + added).to(out.dtype.element_ty)
        tl.store(out + row * WIDTH + i, total, mask=inside)
    total = total.to(tl.float32)
    tl.store(squares + row, tl.sum(total * total, axis=0))
    total *= tl.load(scale + i, mask=inside, other=0)
    tl.store(scaled + row * WIDTH + i, total.to(scaled.dtype.element_ty), mask=inside)


@jit
def rotate(
    qkv, squares, added, cos, sin, query, key, value, rows, length, start,
    qkv_batch, qkv_token, cos_batch, cos_token, sin_batch, sin_token,
    query_batch, query_token, query_head, key_batch, key_token, key_head,
    value_batch, value_token, value_head,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HALF: tl.constexpr, INPUTS: tl.constexpr,
    PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, HAS_ADDED: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one token, all heads: r · qkv + added, split; queries and keys turned.

    `start` is the first token's place among keys and values.
    """
    batch = (tl.program_id(0) // length).to(tl.int64)
    token = tl.program_id(0) % length
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    i = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < QUERIES + 2 * KEYS) & (i < HALF)
    column = head * (2 * HALF) + i
    place = qkv + batch * qkv_batch + token * qkv_token + column
    first = tl.load(place, mask=inside, other=0).to(tl.float32)
    second = tl.load(place + HALF, mask=inside, other=0).to(tl.float32)
    row = tl.program_id(0) + tl.zeros((HEADS_BLOCK,), tl.int32)
    loaded = load_squares(squares, row, row < rows, rows, PARTS, PARTS_BLOCK)
    factor = norm_factor(loaded, INPUTS)[:, None]
    first, second = first * factor, second * factor
    if HAS_ADDED:
        first += tl.load(added + column, mask=inside, other=0)
        second += tl.load(added + column + HALF, mask=inside, other=0)
    c = tl.load(cos + batch * cos_batch + token * cos_token + i, mask=i < HALF, other=0)
    s = tl.load(sin + batch * sin_batch + token * sin_token + i, mask=i < HALF, other=0)
    turned = turn(first, second, c, s)

    kind = key.dtype.element_ty
    if QUERIES > 0:
        is_query = inside & (head < QUERIES)
        to = query + batch * query_batch + token * query_token + head * query_head + i
        tl.store(to, turned[0].to(kind), mask=is_query)
        tl.store(to + HALF, turned[1].to(kind), mask=is_query)
    is_key = inside & (head >= QUERIES) & (head < QUERIES + KEYS)
    to = key + batch * key_batch + (start + token) * key_token + (head - QUERIES) * key_head + i
    tl.store(to, turned[0].to(kind), mask=is_key)
    tl.store(to + HALF, turned[1].to(kind), mask=is_key)
    is_value = inside & (head >= QUERIES + KEYS)
    to = value + batch * value_batch + (start + token) * value_token
    to += (head - QUERIES - KEYS) * value_head + i
    tl.store(to, first.to(kind), mask=is_value)
    tl.store(to + HALF, second.to(kind), mask=is_value)


@jit
def gelu_product(
    gate_up, squares, added, out, rows, stride,
    WIDTH: tl.constexpr, INPUTS: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr,
    HAS_ADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gelu(gate) · up, of r · gate_up + added."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < WIDTH
    gate = tl.load(gate_up + row * stride + i, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up + row * stride + WIDTH + i, mask=inside, other=0).to(tl.float32)
    # Of one row, as a vector of one: a factor for every element.
    here = tl.program_id(0) + tl.zeros((1,), tl.int32)
    factor = norm_factor(load_squares(squares, here, here < rows, rows, PARTS, PARTS_BLOCK), INPUTS)
    gate, up = gate * factor, up * factor
    if HAS_ADDED:
        gate += tl.load(added + i, mask=inside, other=0)
        up += tl.load(added + WIDTH + i, mask=inside, other=0)
    tl.store(out + row * WIDTH + i, (gelu(gate) * up).to(out.dtype.element_ty), mask=inside)
