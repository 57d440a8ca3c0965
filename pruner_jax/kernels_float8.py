"""Launch of `pruner_kernels.float8`, and a library's product of what it writes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pruner_jax import kernels_plain as plain
from pruner_jax.float8 import Quantized, multiply
from pruner_jax.triton_call import capability, triton_call
from pruner_kernels import float8
from pruner_kernels.tiles import power_of_two
from pruner_spec.float8 import SMALLEST


def product(x: Float[Array, "R D"], kernel: Float[Array, "D N"] | Quantized) -> Float[Array, "R N"]:
    """`kernels_plain.product`. Before Ada, GPUs have no float8, nor has Triton there."""
    is_older = 0 < capability() < 89
    if not isinstance(kernel, Quantized) or is_older:
        return plain.product(x, kernel)
    return multiply(quantize_rows(x), kernel, x.dtype)


def quantize_rows(x: Float[Array, "R D"]) -> Quantized:
    """`float8.quantize_rows`."""
    rows, width = x.shape
    block = power_of_two(width)
    values, scale = triton_call(
        float8.quantize_rows,
        {
            "x": x,
            "values": jax.ShapeDtypeStruct(x.shape, jnp.float8_e4m3fn),
            "scale": jax.ShapeDtypeStruct((rows,), jnp.float32),
            "stride": width,
            "WIDTH": width,
            "BLOCK": block,
            "SMALLEST": SMALLEST,
        },
        grid=(rows,),
        num_warps=min(max(block // 512, 1), 16),
    )
    return Quantized(values, scale)
