"""Products of float8 values: half of bfloat16's bytes, and on a GPU from Ada on twice its rate.

float8_e4m3fn has four bits of precision and reaches from 2^-9 to 448. So each row of an input and
each output of a kernel has a scale of its own, a power of two, by which its largest value comes
into (224, 448]; a product is multiplied by both. Kernels are rounded when they are deployed, inputs
where they are read.

To divide by a power of two is exact. By another number Triton divides less precisely than PyTorch,
and what lies near the middle of two float8 values would be rounded up by one and down by the other.

Dimension letters: R rows, D inputs, N outputs.
"""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from pruner_spec.float8 import SMALLEST, scale_exponent
from pruner_torch.layers import wide


@dataclasses.dataclass(frozen=True)
class Quantized:
    """Rows in float8; of a kernel they are its outputs, as a library reads them.

    Attributes:
        values: in float8_e4m3fn.
        scale: float32, by which a row's values are to be multiplied; NaN of one not finite.
    """

    values: Float[Tensor, "N D"]
    scale: Float[Tensor, "N"]

    @property
    def shape(self) -> tuple[int, int]:
        """A kernel's: inputs and outputs."""
        return self.values.shape[1], self.values.shape[0]


def quantize(kernel: Float[Tensor, "D N"]) -> Quantized:
    """A kernel, a scale an output."""
    return quantize_rows(kernel.T)


def quantize_rows(x: Float[Tensor, "R D"]) -> Quantized:
    """An input, a scale a row. A row that is not finite gives a product of NaN."""
    rows = x.to(torch.float32)
    largest = rows.abs().amax(dim=-1).clamp(min=SMALLEST)
    exponent = scale_exponent(largest.view(torch.int32))
    scale, inverse = ((each << 23).view(torch.float32) for each in (exponent, 254 - exponent))
    values = (rows * inverse[:, None]).to(torch.float8_e4m3fn)
    return Quantized(values.contiguous(), torch.where(largest.isfinite(), scale, torch.nan))


def multiply(rows: Quantized, kernel: Quantized, dtype: torch.dtype) -> Float[Tensor, "R N"]:
    """rows · kernel: by cuBLAS where it can, and else in `wide` precision.

    Args:
        rows: an input.
        kernel: of as many inputs.
        dtype: of the result.
    """
    if _has_library(kernel, dtype):
        return torch._scaled_mm(
            rows.values,
            kernel.values.T,
            scale_a=rows.scale[:, None],
            scale_b=kernel.scale[None],
            out_dtype=dtype,
            use_fast_accum=True,
        )
    high = wide(dtype)
    y = rows.values.to(high) @ kernel.values.to(high).T
    return (y * rows.scale[:, None] * kernel.scale).to(dtype)


def _has_library(kernel: Quantized, dtype: torch.dtype) -> bool:
    """Whether cuBLAS, or CUTLASS in its place, multiplies these."""
    values = kernel.values
    if not values.is_cuda or torch.version.hip is not None or dtype != torch.bfloat16:
        return False
    fits = values.shape[0] % 16 == 0 and values.shape[1] % 16 == 0
    return fits and torch.cuda.get_device_capability(values.device) >= (8, 9)
