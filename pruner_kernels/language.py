"""What the kernels have in common."""

from typing import Any

import triton
import triton.language as tl
from triton import knobs

from pruner_spec.sequence import MASKED_LOGIT

jit: Any = triton.jit  # whose type has no grid's and no launch's arguments
EPSILON = tl.constexpr(1e-6)  # of Gemma's RMS norms
MASKED = tl.constexpr(MASKED_LOGIT)
LOG2_E = tl.constexpr(1.4426950408889634)
# The interpreter's product of bfloat16 is wrong; that of float32 is right.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@jit
def dot(a, b, total):
    """total + a · b, in float32 from the operands as they are."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")


@jit
def gelu(x):
    """GELU in its tanh approximation, of float32: 0.5 (1 + tanh(u)) is the sigmoid of 2 u."""
    u = 0.7978845608028654 * x * (1 + 0.044715 * x * x)
    return x / (1 + tl.exp(-2 * u))


@jit
def turn(first, second, cos, sin):
    """RoPE of a head's two halves, in float32."""
    return first * cos - second * sin, second * cos + first * sin


@jit
def packed(row, k, ROWS: tl.constexpr):
    """Where an element is in packed rows [D / 32, 4, ROWS, 8]; `few_rows.cu` reads them."""
    return ((k // 32 * 4 + k % 8 // 2) * ROWS + row) * 8 + k % 32 // 8 * 2 + k % 2


@jit
def load_squares(squares, row, is_row, rows, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr):
    """Sums of squares of rows, as PARTS programs left them: [PARTS, rows]. See `norm_factor`."""
    part = tl.arange(0, PARTS_BLOCK)
    place = squares + part[:, None] * rows + row[None, :]
    return tl.load(place, mask=(part < PARTS)[:, None] & is_row[None, :], other=0)


@jit
def norm_factor(loaded, WIDTH: tl.constexpr):
    """1 / rms of each row. Apart from the loads, which are under way while something else runs."""
    return tl.rsqrt(tl.sum(loaded, axis=0) / WIDTH + EPSILON)


@jit
def is_last(counter, PARTS: tl.constexpr):
    """Whether all other parts of a tile are in memory; once true, the counter is 0 again."""
    # What all threads have stored is there before one of them counts, and is read after.
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == PARTS - 1
    if last:
        tl.store(counter, 0)
    return last
