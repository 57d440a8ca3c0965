"""An input of a product in float8, a row a program: read once, written once."""

import triton.language as tl

from pruner_kernels.language import jit


@jit
def quantize_rows(
    x, values, scale, stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """A row over its scale, and that scale, as `pruner_spec.float8` has its exponent."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < WIDTH
    y = tl.load(x + row * stride + i, mask=inside, other=0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(y), axis=0), SMALLEST)
    exponent = ((largest.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8
    factor = (exponent << 23).to(tl.float32, bitcast=True)
    tl.store(scale + row, tl.where(largest < float("inf"), factor, float("nan")))
    y *= ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(values + row * WIDTH + i, y.to(values.dtype.element_ty), mask=inside)
