"""Products of few rows with a large kernel, as the denoising steps have them.

Such a product takes as long as its kernel takes to arrive from memory. So that nothing stands
between the loads and the tensor cores, a norm is computed around the product, not before it: with
r = 1 / rms(x), a row's norm times a kernel is r · ((x · scale) kernel) + shift kernel. Whoever
writes x writes x · scale and the sum of the squares beside it; r and the shift's product, which is
known beforehand, are applied to the result.

A kernel lies in memory with its outputs first, [outputs, inputs]: each output's weights are
adjacent, and the two that a program needs together (halves of a head, a gate and its up) may stand
anywhere. Dimension letters: R rows, D width, N outputs.
"""

import triton.language as tl

from pruner_kernels.language import (
    dot,
    gelu,
    is_last,
    jit,
    load_squares,
    norm_factor,
    turn,
)


@jit
def product(
    x, kernel, row, rows, column, start, x_stride,
    INPUTS: tl.constexpr, SPAN: tl.constexpr, OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Rows times columns of a kernel, over SPAN inputs from `start` on; in float32."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for turn_start in range(0, SPAN, INNER):
        local = turn_start + tl.arange(0, INNER)
        k = start + local
        to_w = kernel + column[None, :] * INPUTS + k[:, None]
        to_x = x + row[:, None] * x_stride + k[None, :]
        if SPAN % INNER == 0:
            w = tl.load(to_w, mask=(column < OUTPUTS)[None, :], other=0.0)
            a = tl.load(to_x, mask=(row < rows)[:, None], other=0.0)
        else:
            inside = local < SPAN
            w = tl.load(to_w, mask=(column < OUTPUTS)[None, :] & inside[:, None], other=0.0)
            a = tl.load(to_x, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        total = dot(a, w.to(a.dtype), total)
    return total


@jit
def project(
    x, squares, kernel, added, cos, sin, query, key, value, rows, length, place,
    x_stride, cos_batch, cos_token, sin_batch, sin_token, query_batch, query_token, query_head,
    key_batch, key_token, key_head, value_batch, value_token, value_head,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HALF: tl.constexpr, INPUTS: tl.constexpr,
    PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Queries, keys and values, queries and keys turned.

    A program has COLUMNS / 2 columns of a head's first half, and those that they are turned with,
    one after the other. `place` is that of the first token among keys and values.
    """
    BLOCK: tl.constexpr = COLUMNS // 2
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    head = tl.program_id(0) // (HALF // BLOCK)
    first_column = head * (2 * HALF) + tl.program_id(0) % (HALF // BLOCK) * BLOCK
    j = tl.arange(0, COLUMNS)
    column = first_column + j // 2 + j % 2 * HALF
    i = tl.program_id(0) % (HALF // BLOCK) * BLOCK + tl.arange(0, BLOCK)
    batch, token = (row // length).to(tl.int64), row % length
    turns = is_row[:, None] & (head < QUERIES + KEYS)
    OUTPUTS: tl.constexpr = (QUERIES + 2 * KEYS) * 2 * HALF
    c = cos + (batch * cos_batch + token * cos_token)[:, None] + i[None, :]
    c = tl.load(c, mask=turns, other=1)
    s = sin + (batch * sin_batch + token * sin_token)[:, None] + i[None, :]
    s = tl.load(s, mask=turns, other=0)
    if HAS_ADDED:
        column_added = tl.load(added + column)
    loaded = load_squares(squares, row, is_row, rows, PARTS, PARTS_BLOCK)
    total = product(
        x, kernel, row, rows, column, 0, x_stride, INPUTS, INPUTS, OUTPUTS, ROWS, COLUMNS, INNER
    )
    total *= norm_factor(loaded, INPUTS)[:, None]
    if HAS_ADDED:
        total += column_added[None, :]
    first, second = tl.split(tl.reshape(total, (ROWS, BLOCK, 2)))
    first, second = turn(first, second, c, s)
    if head < QUERIES:
        to = query + batch * query_batch + token * query_token + head * query_head
    elif head < QUERIES + KEYS:
        to = key + batch * key_batch + (place + token) * key_token + (head - QUERIES) * key_head
    else:
        to = value + batch * value_batch + (place + token) * value_token
        to += (head - QUERIES - KEYS) * value_head
    to = to[:, None] + i[None, :]
    tl.store(to, first.to(query.dtype.element_ty), mask=is_row[:, None])
    tl.store(to + HALF, second.to(query.dtype.element_ty), mask=is_row[:, None])


@jit
def gated(
    x, squares, kernel, added, out, rows, x_stride,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
    PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """gelu(gate) · up. A program has COLUMNS / 2 gates and their ups, one after the other."""
    BLOCK: tl.constexpr = COLUMNS // 2
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    j = tl.arange(0, COLUMNS)
    place = tl.program_id(0) * BLOCK + j // 2
    # Past the last gate nothing is read: as a column beyond all.
    column = tl.where(place < OUTPUTS, place + j % 2 * OUTPUTS, 2 * OUTPUTS)
    if HAS_ADDED:
        column_added = tl.load(added + column, mask=column < 2 * OUTPUTS, other=0)
    loaded = load_squares(squares, row, is_row, rows, PARTS, PARTS_BLOCK)
    total = product(
        x, kernel, row, rows, column, 0, x_stride, INPUTS, INPUTS, 2 * OUTPUTS, ROWS, COLUMNS,
        INNER,
    )  # fmt: skip
    total *= norm_factor(loaded, INPUTS)[:, None]
    if HAS_ADDED:
        total += column_added[None, :]
    gate, up = tl.split(tl.reshape(total, (ROWS, BLOCK, 2)))
    y = gelu(gate) * up
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    to = out + row[:, None] * OUTPUTS + i[None, :]
    tl.store(to, y.to(out.dtype.element_ty), mask=is_row[:, None] & (i < OUTPUTS)[None, :])


@jit
def write_merged(
    total, column_gate, next_scale, before, out, scaled, squares, row, rows, is_row,
    tile, column, inside, OUTPUTS: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    if HAS_GATE:
        total *= column_gate[None, :]
    total += before
    # What is normalised later is what is written, rounded.
    rounded = total.to(out.dtype.element_ty)
    to = row[:, None] * OUTPUTS + column[None, :]
    tl.store(out + to, rounded, mask=inside)
    x = tl.where(inside, rounded.to(tl.float32), 0)
    tl.store(squares + tile * rows + row, tl.sum(x * x, axis=1), mask=is_row)
    tl.store(scaled + to, (x * next_scale[None, :]).to(out.dtype.element_ty), mask=inside)


@jit
def merge(
    x, kernel, residual, gate, scale, counters, out, scaled, squares, partials,
    rows, x_stride, residual_stride,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """residual + (x · kernel) · gate; and that times a scale, and the sums of its squares.

    PARTS programs share a tile's inputs. Each leaves its part in memory and counts itself in; the
    one that finds itself last adds up the parts in their order, so that the result does not depend
    on who came last, and sets the count back to 0 for the next launch.
    """
    part = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < OUTPUTS
    inside = (row < rows)[:, None] & is_column[None, :]
    SPAN: tl.constexpr = INPUTS // PARTS
    # What is needed at the end is on its way from the beginning.
    column_gate = column
    if HAS_GATE:
        column_gate = tl.load(gate + column, mask=is_column, other=0).to(tl.float32)
    next_scale = tl.load(scale + column, mask=is_column, other=0)
    before = residual + row[:, None] * residual_stride + column[None, :]
    before = tl.load(before, mask=inside, other=0)
    total = product(
        x, kernel, row, rows, column, part * SPAN, x_stride, INPUTS, SPAN, OUTPUTS, ROWS, COLUMNS,
        INNER,
    )  # fmt: skip
    before = before.to(tl.float32)
    if PARTS == 1:
        write_merged(
            total, column_gate, next_scale, before, out, scaled, squares, row, rows,
            row < rows, tl.program_id(0), column, inside, OUTPUTS, HAS_GATE,
        )  # fmt: skip
    else:
        tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        AREA: tl.constexpr = ROWS * COLUMNS
        i = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        mine = partials + tile * (PARTS * AREA) + i
        tl.store(mine + part * AREA, total)
        if is_last(counters + tile, PARTS):
            total = tl.load(mine, cache_modifier=".cg")
            for other in tl.static_range(1, PARTS):  # pyright: ignore[reportGeneralTypeIssues]
                total += tl.load(mine + other * AREA, cache_modifier=".cg")
            write_merged(
                total, column_gate, next_scale, before, out, scaled, squares, row,
                rows, row < rows, tl.program_id(0), column, inside, OUTPUTS, HAS_GATE,
            )  # fmt: skip


@jit
def euler_step(
    x, squares, scale, shift, kernel, bias, noisy, out, rows, step,
    WIDTH: tl.constexpr, ACTIONS: tl.constexpr, ACTIONS_BLOCK: tl.constexpr,
    LENGTH: tl.constexpr, HORIZON: tl.constexpr,
    PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, INNER: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    """noisy + step · velocity, of one action a program: the final norm, and a map in float32.

    Actions are the last HORIZON tokens of the LENGTH of a sample.
    """
    action = tl.program_id(0)
    row = action // HORIZON * LENGTH + LENGTH - HORIZON + action % HORIZON
    a = tl.arange(0, ACTIONS_BLOCK)
    is_action = a < ACTIONS
    velocity = tl.load(bias + a, mask=is_action, other=0)
    before = tl.load(noisy + action * ACTIONS + a, mask=is_action, other=0)
    here = row + tl.zeros((1,), tl.int32)
    loaded = load_squares(squares, here, here < rows, rows, PARTS, PARTS_BLOCK)
    factor = norm_factor(loaded, WIDTH)
    for start in tl.static_range(0, WIDTH, INNER):
        k = start + tl.arange(0, INNER)
        inside = k < WIDTH
        y = tl.load(x + row * WIDTH + k, mask=inside, other=0)
        normed = y.to(tl.float32) * factor * tl.load(scale + k, mask=inside, other=0)
        if HAS_SHIFT:
            normed += tl.load(shift + k, mask=inside, other=0)
        normed = normed.to(y.dtype).to(tl.float32)  # as the plain path rounds it
        place = kernel + k[:, None] * ACTIONS + a[None, :]
        w = tl.load(place, mask=inside[:, None] & is_action[None, :], other=0)
        velocity += tl.sum(normed[:, None] * w, axis=0)
    tl.store(out + action * ACTIONS + a, before + step * velocity, mask=is_action)


@jit
def embed_actions(
    noisy, kernel, bias, scale, out, scaled, squares,
    WIDTH: tl.constexpr, ACTIONS: tl.constexpr, ACTIONS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """An action's token, in float32 until it is written; that times a scale; its squares' sum."""
    row = tl.program_id(0)
    a = tl.arange(0, ACTIONS_BLOCK)
    is_action = a < ACTIONS
    k = tl.arange(0, BLOCK)
    inside = k < WIDTH
    place = kernel + a[:, None] * WIDTH + k[None, :]
    w = tl.load(place, mask=is_action[:, None] & inside[None, :], other=0)
    y = tl.load(bias + k, mask=inside, other=0)
    next_scale = tl.load(scale + k, mask=inside, other=0)
    actions = tl.load(noisy + row * ACTIONS + a, mask=is_action, other=0)
    y += tl.sum(actions[:, None] * w, axis=0)
    rounded = y.to(out.dtype.element_ty)
    tl.store(out + row * WIDTH + k, rounded, mask=inside)
    y = tl.where(inside, rounded.to(tl.float32), 0)
    tl.store(squares + row, tl.sum(y * y, axis=0))
    tl.store(scaled + row * WIDTH + k, (y * next_scale).to(out.dtype.element_ty), mask=inside)
