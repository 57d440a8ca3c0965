"""An input of a product in float8, a row a program: read once, written once."""

import triton.language as tl

from pruner_kernels.language import jit


@jit
def quantize_rows(
    x, values, scale, stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """A row over its scale, by which its largest value becomes LARGEST; and that scale."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < WIDTH
    y = tl.load(x + row * stride + i, mask=inside, other=0).to(tl.float32)
    factor = tl.maximum(tl.max(tl.abs(y), axis=0), SMALLEST) * (1 / LARGEST)
    tl.store(scale + row, factor)
    y *= 1 / factor
    tl.store(values + row * WIDTH + i, y.to(values.dtype.element_ty), mask=inside)
