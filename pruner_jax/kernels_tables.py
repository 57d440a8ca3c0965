"""`pruner_kernels`'s kernels over dense arrays, of whose vectors some are rows of tables.

A custom call's pointers are those of whole arrays, so that a kernel itself must find its row of a
table; PyTorch passes a view. Of a schedule's tables all vectors of a launch are of one step: a
vector's stride is 0 where all steps have the same, and `step`, a pointer to an integer, None where
all vectors have. Elsewhere each has a row of its own, None where it is no table's.
"""

import triton.language as tl

from pruner_kernels import pointwise, rows, vision
from pruner_kernels.language import jit


@jit
def project(
    x, squares, kernel, added, step, cos, sin, query, key, value,
    ADDED_STRIDE: tl.constexpr, COUNT: tl.constexpr, LENGTH: tl.constexpr, ROOM: tl.constexpr,
    PLACE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, HALF: tl.constexpr,
    INPUTS: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr,
    HAS_ADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """`rows.project` of COUNT rows, into ROOM keys and values a sample."""
    HEAD: tl.constexpr = 2 * HALF
    if step is not None:
        added += tl.load(step) * ADDED_STRIDE
    rows.project(
        x, squares, kernel, added, cos, sin, query, key, value, COUNT, LENGTH, PLACE,
        INPUTS, LENGTH * HALF, HALF, LENGTH * HALF, HALF,
        LENGTH * QUERIES * HEAD, QUERIES * HEAD, HEAD,
        ROOM * KEYS * HEAD, KEYS * HEAD, HEAD, ROOM * KEYS * HEAD, KEYS * HEAD, HEAD,
        QUERIES, KEYS, HALF, INPUTS, PARTS, PARTS_BLOCK, HAS_ADDED, ROWS, COLUMNS, INNER,
    )  # fmt: skip


@jit
def gated(
    x, squares, kernel, added, step, out,
    ADDED_STRIDE: tl.constexpr, COUNT: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
    PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr,
    HAS_ADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """`rows.gated` of COUNT rows."""
    if step is not None:
        added += tl.load(step) * ADDED_STRIDE
    rows.gated(
        x, squares, kernel, added, out, COUNT, INPUTS, INPUTS, OUTPUTS, PARTS, PARTS_BLOCK,
        HAS_ADDED, ROWS, COLUMNS, INNER,
    )  # fmt: skip


@jit
def merge(
    x, kernel, residual, gate, scale, step, counters, out, scaled, squares, partials,
    GATE_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr, COUNT: tl.constexpr,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, HAS_GATE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`rows.merge` of COUNT rows, with a scale."""
    if step is not None:
        now = tl.load(step)
        scale += now * SCALE_STRIDE
        if HAS_GATE:
            gate += now * GATE_STRIDE
    rows.merge(
        x, kernel, residual, gate, scale, counters, out, scaled, squares, partials, COUNT,
        INPUTS, OUTPUTS, INPUTS, OUTPUTS, HAS_GATE, ROWS, COLUMNS, INNER, PARTS,
    )  # fmt: skip


@jit
def euler_step(
    x, squares, scale, shift, now, kernel, bias, noisy,
    SCALE_STRIDE: tl.constexpr, SHIFT_STRIDE: tl.constexpr, COUNT: tl.constexpr,
    STEP: tl.constexpr, WIDTH: tl.constexpr, ACTIONS: tl.constexpr, ACTIONS_BLOCK: tl.constexpr,
    LENGTH: tl.constexpr, HORIZON: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr,
    INNER: tl.constexpr, HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    """`rows.euler_step` by STEP, in place; `now` is what is `step` elsewhere."""
    if now is not None:
        place = tl.load(now)
        scale += place * SCALE_STRIDE
        if HAS_SHIFT:
            shift += place * SHIFT_STRIDE
    rows.euler_step(
        x, squares, scale, shift, kernel, bias, noisy, noisy, COUNT, STEP, WIDTH, ACTIONS,
        ACTIONS_BLOCK, LENGTH, HORIZON, PARTS, PARTS_BLOCK, INNER, HAS_SHIFT,
    )  # fmt: skip


@jit
def embed_actions(
    noisy, kernel, bias, scale, step, out, scaled, squares,
    SCALE_STRIDE: tl.constexpr, WIDTH: tl.constexpr, ACTIONS: tl.constexpr,
    ACTIONS_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`rows.embed_actions`."""
    if step is not None:
        scale += tl.load(step) * SCALE_STRIDE
    rows.embed_actions(
        noisy, kernel, bias, scale, out, scaled, squares, WIDTH, ACTIONS, ACTIONS_BLOCK, BLOCK,
    )  # fmt: skip


@jit
def found(vector, row, WIDTH: tl.constexpr):
    if row is not None:
        vector += tl.load(row) * WIDTH
    return vector


@jit
def add_layer_norm(
    x, y, bias, bias_row, scale, scale_row, shift, shift_row, total, normed,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """`vision.add_layer_norm`."""
    bias = found(bias, bias_row, WIDTH)
    scale = found(scale, scale_row, WIDTH)
    shift = found(shift, shift_row, WIDTH)
    vision.add_layer_norm(
        x, y, bias, scale, shift, total, normed, WIDTH, WIDTH, WIDTH, True, BLOCK, EPSILON
    )


@jit
def attend_patches(
    qkv, bias, bias_row, out, count, SCALE: tl.constexpr, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, MOST: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """`vision.attend_patches`, with a bias."""
    bias = found(bias, bias_row, 3 * HEADS * HEAD_DIM)
    vision.attend_patches(
        qkv, bias, out, count, SCALE, HEADS, HEAD_DIM, True, ROWS, KEYS, MOST, REST,
    )  # fmt: skip


@jit
def gelu_bias(
    x, bias, bias_row, out, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`vision.gelu_bias`."""
    vision.gelu_bias(x, found(bias, bias_row, WIDTH), out, rows, WIDTH, ROWS, COLUMNS)


@jit
def split_bias(
    x, bias, bias_row, query, key, value, rows,
    SCALE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`vision.split_bias`."""
    bias = found(bias, bias_row, 3 * WIDTH)
    vision.split_bias(x, bias, query, key, value, rows, SCALE, WIDTH, ROWS, COLUMNS)


@jit
def rotate(
    qkv, squares, added, added_row, cos, sin, query, key, value,
    COUNT: tl.constexpr, LENGTH: tl.constexpr, ROOM: tl.constexpr, PLACE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HALF: tl.constexpr, INPUTS: tl.constexpr,
    PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, HAS_ADDED: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """`pointwise.rotate` of COUNT tokens, into ROOM keys and values a sample."""
    HEAD: tl.constexpr = 2 * HALF
    OUTPUTS: tl.constexpr = (QUERIES + 2 * KEYS) * HEAD
    if HAS_ADDED:
        added = found(added, added_row, OUTPUTS)
    pointwise.rotate(
        qkv, squares, added, cos, sin, query, key, value, COUNT, LENGTH, PLACE,
        LENGTH * OUTPUTS, OUTPUTS, LENGTH * HALF, HALF, LENGTH * HALF, HALF,
        LENGTH * QUERIES * HEAD, QUERIES * HEAD, HEAD,
        ROOM * KEYS * HEAD, KEYS * HEAD, HEAD, ROOM * KEYS * HEAD, KEYS * HEAD, HEAD,
        QUERIES, KEYS, HALF, INPUTS, PARTS, PARTS_BLOCK, HAS_ADDED, HEADS_BLOCK, HALF_BLOCK,
    )  # fmt: skip


@jit
def gelu_product(
    gate_up, squares, added, added_row, out,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, INPUTS: tl.constexpr, PARTS: tl.constexpr,
    PARTS_BLOCK: tl.constexpr, HAS_ADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`pointwise.gelu_product` of COUNT rows."""
    if HAS_ADDED:
        added = found(added, added_row, 2 * WIDTH)
    pointwise.gelu_product(
        gate_up, squares, added, out, COUNT, 2 * WIDTH, WIDTH, INPUTS, PARTS, PARTS_BLOCK,
        HAS_ADDED, BLOCK,
    )  # fmt: skip


@jit
def add_scaled(
    x, y, gate, gate_row, scale, scale_row, out, scaled, squares,
    WIDTH: tl.constexpr, HAS_SUM: tl.constexpr, HAS_GATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`pointwise.add_scaled`."""
    if HAS_GATE:
        gate = found(gate, gate_row, WIDTH)
    scale = found(scale, scale_row, WIDTH)
    pointwise.add_scaled(
        x, y, gate, scale, out, scaled, squares, WIDTH, WIDTH, WIDTH, HAS_SUM, HAS_GATE, BLOCK
    )
