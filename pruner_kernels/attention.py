"""Softmax attention of many heads to the same keys (one kv head), in base 2.

A row is a (token, head) pair. Where one program a tile would leave most of the GPU idle, PARTS
programs share a tile's keys; the one that finds itself last puts the parts together.
"""

import triton.language as tl

from pruner_kernels.language import LOG2_E, MASKED, dot, is_last, jit, packed


@jit
def fold(
    q, key, value, mask, start, stop, keys, key_token, value_token, mask_token,
    HEAD_DIM: tl.constexpr, HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of keys from `start` to `stop`: each row's largest logit, the sum of its exponentials over
    that, and the sum of the values times them; in base 2."""
    h = tl.arange(0, WIDTH)
    is_h = h < HEAD_DIM
    # Some key is within, masked or not: after the first turn a row's top is finite.
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    sum = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for turn_start in range(start, stop, KEYS):
        t = turn_start + tl.arange(0, KEYS)
        is_key = t < keys
        inside = is_key[:, None] & is_h[None, :]
        k = tl.load(key + t[:, None] * key_token + h[None, :], mask=inside, other=0)
        v = tl.load(value + t[:, None] * value_token + h[None, :], mask=inside, other=0)
        logits = dot(q, k.T, tl.zeros((ROWS, KEYS), tl.float32)) * LOG2_E
        if HAS_MASK:
            visible = tl.load(mask + t * mask_token, mask=is_key, other=0) != 0
            logits = tl.where(visible[None, :], logits, MASKED)
        logits = tl.where(is_key[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        fade = tl.exp2(top - new_top)
        weight = tl.exp2(logits - new_top[:, None])
        sum = sum * fade + tl.sum(weight, axis=1)
        total = dot(weight.to(v.dtype), v, total * fade[:, None])
        top = new_top
    return top, sum, total


@jit
def attend(
    query, key, value, mask, out, tops, sums, totals, counters, length, keys, span,
    query_batch, query_token, query_head, key_batch, key_token, value_batch, value_token,
    mask_batch, mask_token,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Softmax attention of rows (token, head) to a span of the keys.

    PACKED is 0, or of how many packed rows the result is, a token each.
    """
    batch = tl.program_id(2).to(tl.int64)
    part = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < length * HEADS
    h = tl.arange(0, WIDTH)
    is_h = h < HEAD_DIM
    place = query + batch * query_batch + row // HEADS * query_token + row % HEADS * query_head
    q = tl.load(place[:, None] + h[None, :], mask=is_row[:, None] & is_h[None, :], other=0)

    of_mask = mask
    if HAS_MASK:
        of_mask = mask + batch * mask_batch
    top, sum, total = fold(
        q, key + batch * key_batch, value + batch * value_batch, of_mask,
        part * span, tl.minimum(part * span + span, keys), keys, key_token, value_token,
        mask_token, HEAD_DIM, HAS_MASK, ROWS, KEYS, WIDTH,
    )  # fmt: skip

    if PACKED:
        k = (row % HEADS * HEAD_DIM)[:, None] + h[None, :]
        to = out + packed((batch * length + row // HEADS)[:, None], k, PACKED)
    else:
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
            for other in tl.static_range(1, PARTS):  # pyright: ignore[reportGeneralTypeIssues]
                top = tl.maximum(top, tl.load(tops + i + other * ROWS, cache_modifier=".cg"))
            sum = tl.zeros((ROWS,), tl.float32)
            total = tl.zeros((ROWS, WIDTH), tl.float32)
            for other in tl.static_range(PARTS):
                fade = tl.exp2(tl.load(tops + i + other * ROWS, cache_modifier=".cg") - top)
                sum += fade * tl.load(sums + i + other * ROWS, cache_modifier=".cg")
                theirs = tl.load(totals + j + other * (ROWS * WIDTH), cache_modifier=".cg")
                total += fade[:, None] * theirs
            tl.store(to, (total / sum[:, None]).to(out.dtype.element_ty), mask=written)
