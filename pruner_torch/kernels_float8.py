"""Launch of `pruner_kernels.float8`, and a library's product of what it writes."""

import torch
from jaxtyping import Float
from torch import Tensor

from pruner_kernels import float8
from pruner_kernels.tiles import power_of_two
from pruner_spec.float8 import SMALLEST
from pruner_torch import kernels_plain as plain
from pruner_torch.float8 import Quantized, multiply


def product(
    x: Float[Tensor, "R D"], kernel: Float[Tensor, "D N"] | Quantized
) -> Float[Tensor, "R N"]:
    """`kernels_plain.product`. Before Ada, GPUs have no float8, nor has Triton there."""
    is_older = x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9)
    if not isinstance(kernel, Quantized) or is_older:
        return plain.product(x, kernel)
    return multiply(quantize_rows(x), kernel, x.dtype)


def quantize_rows(x: Float[Tensor, "R D"]) -> Quantized:
    """`float8.quantize_rows`."""
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
    block = power_of_two(x.shape[1])
    float8.quantize_rows[(len(x),)](
        x, values, scale, x.stride(0),
        WIDTH=x.shape[1], BLOCK=block, SMALLEST=SMALLEST, num_warps=min(max(block // 512, 1), 16),
    )  # fmt: skip
    return Quantized(values, scale)
