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

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pruner_jax import triton_call
from pruner_jax.layers import wide
from pruner_jax.tables import value_of
from pruner_spec.float8 import SMALLEST, scale_exponent


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """Rows in float8; of a kernel they are its outputs, as a library reads them.

    Attributes:
        values: in float8_e4m3fn.
        scale: float32, by which a row's values are to be multiplied; NaN of one not finite.
    """

    values: Float[Array, "N D"]
    scale: Float[Array, "N"]

    @property
    def shape(self) -> tuple[int, int]:
        """A kernel's: inputs and outputs."""
        return self.values.shape[1], self.values.shape[0]


def quantize(kernel: Float[Array, "D N"]) -> Quantized:
    """A kernel, a scale an output."""
    return quantize_rows(kernel.T)


def quantize_rows(x: Float[Array, "R D"]) -> Quantized:
    """An input, a scale a row. A row that is not finite gives a product of NaN."""
    rows = x.astype(jnp.float32)
    largest = jnp.maximum(jnp.abs(rows).max(axis=-1), SMALLEST)
    exponent = scale_exponent(jax.lax.bitcast_convert_type(largest, jnp.int32))
    scale, inverse = (
        jax.lax.bitcast_convert_type(each << 23, jnp.float32) for each in (exponent, 254 - exponent)
    )
    values = (rows * inverse[:, None]).astype(jnp.float8_e4m3fn)
    return Quantized(values, jnp.where(jnp.isfinite(largest), scale, jnp.nan))


def multiply(rows: Quantized, kernel: Quantized, dtype: jnp.dtype) -> Float[Array, "R N"]:
    """rows · kernel: by cuBLAS where it can, and else in `wide` precision.

    XLA could hand on a scale for all rows. By ours it multiplies where the product is read, which
    is written in bfloat16: a rounding does not mind that they come after it.

    Args:
        rows: an input.
        kernel: of as many inputs.
        dtype: of the result.
    """
    high, by_inputs = wide(dtype), (((1,), (1,)), ((), ()))
    x, y, kept = rows.values, kernel.values, dtype
    if not _has_library(dtype):
        # Or XLA for a GPU takes what was rounded to float8 and read again for what it was before.
        x, y = jax.lax.optimization_barrier((x, y))
        x, y, kept = x.astype(high), y.astype(high), high
    product = jax.lax.dot_general(x, y, by_inputs, preferred_element_type=kept).astype(high)
    return (product * rows.scale[:, None] * value_of(kernel.scale)).astype(dtype)


def _has_library(dtype: jnp.dtype) -> bool:
    """Whether cuBLAS multiplies float8 to this dtype."""
    return dtype == jnp.bfloat16 and triton_call.capability() >= 89
