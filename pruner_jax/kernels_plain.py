"""What the kernels of `kernels` compute, in JAX's own operations: where they do not apply.

The same names and arguments; the letters are there.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pruner_jax import layers
from pruner_jax.float8 import Quantized, multiply, quantize_rows
from pruner_jax.gemma import RMS_EPSILON
from pruner_jax.tables import TableRow, value_of

MAX_ROWS = 128  # above, a product bound by memory would write twice the bytes in `wide` precision


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Hidden states on their way to a norm.

    With r = 1 / rms(x), a norm times a kernel is r · ((x · scale) kernel) + shift kernel. Who
    writes x writes what the product needs beside it; r and the shift's product come after it.

    Attributes:
        x: of R tokens.
        scaled: x times the norm's scale.
        squares: the sum of each row's squares, in P parts; in `wide` precision.
    """

    x: Float[Array, "R D"]
    scaled: Float[Array, "R D"]
    squares: Float[Array, "P R"]


def packs(rows: int, layer: Any, head_dim: int, actions: int) -> bool:
    """`kernels.packs`: a library takes rows as they are."""
    return False


def product(x: Float[Array, "R D"], kernel: Float[Array, "D N"] | Quantized) -> Float[Array, "R N"]:
    """`kernels.product`; of few rows in `wide` precision."""
    if isinstance(kernel, Quantized):
        return multiply(quantize_rows(x), kernel, x.dtype)
    kept = layers.wide(x.dtype) if len(x) <= MAX_ROWS else x.dtype
    return jnp.matmul(x, kernel, preferred_element_type=kept)


def scale_rows(x: Float[Array, "R D"], scale: Float[Array, "D"] | TableRow) -> Rows:
    """`kernels.scale_rows`."""
    wide = x.astype(layers.wide(x.dtype))
    return Rows(x, (wide * value_of(scale)).astype(x.dtype), jnp.square(wide).sum(axis=-1)[None])


def rotate(
    qkv: Float[Array, "R N"],
    rows: Rows,
    added: Float[Array, "N"] | TableRow | None,
    cos: Float[Array, "B S half"],
    sin: Float[Array, "B S half"],
    key: Float[Array, "B T G H"] | jax.ShapeDtypeStruct,
    value: Float[Array, "B T G H"] | jax.ShapeDtypeStruct,
    place: int,
    num_heads: int,
) -> tuple[Float[Array, "B S K H"], Float[Array, "B T G H"], Float[Array, "B T G H"]]:
    """`kernels.rotate`."""
    batch, length = cos.shape[:2]
    groups, head_dim = key.shape[2:]
    heads = _normed(qkv, rows, added).reshape(batch, length, -1, head_dim)
    query, new_key, new_value = jnp.split(heads, [num_heads, num_heads + groups], axis=2)
    key = _written(key, _turned(new_key, cos, sin), place)
    value = _written(value, new_value, place)
    return _turned(query, cos, sin).astype(key.dtype), key, value


def gelu_product(
    gate_up: Float[Array, "R 2*F"], rows: Rows, added: Float[Array, "2*F"] | TableRow | None
) -> Float[Array, "R F"]:
    """`kernels.gelu_product`."""
    gate, up = jnp.split(_normed(gate_up, rows, added), 2, axis=-1)
    return (layers.gelu(gate) * up).astype(rows.x.dtype)


def add_scaled(
    x: Float[Array, "R D"],
    added: Float[Array, "R D"],
    gate: Float[Array, "D"] | TableRow | None,
    scale: Float[Array, "D"] | TableRow,
) -> Rows:
    """`kernels.add_scaled`."""
    added = added.astype(layers.wide(x.dtype))
    added = added if gate is None else added * value_of(gate)
    return scale_rows((x + added).astype(x.dtype), scale)


def project(
    rows: Rows,
    kernel: Float[Array, "D N"],
    added: Float[Array, "N"] | TableRow | None,
    cos: Float[Array, "B S half"],
    sin: Float[Array, "B S half"],
    key: Float[Array, "B T G H"],
    value: Float[Array, "B T G H"],
    place: int,
    num_heads: int,
) -> tuple[Float[Array, "B S K H"], Float[Array, "B T G H"], Float[Array, "B T G H"]]:
    """`kernels.project`."""
    qkv = product(rows.scaled, kernel)
    return rotate(qkv, rows, added, cos, sin, key, value, place, num_heads)


def gated(
    rows: Rows, gate_up: Float[Array, "D 2*F"], added: Float[Array, "2*F"] | TableRow | None
) -> Float[Array, "R F"]:
    """`kernels.gated`."""
    return gelu_product(product(rows.scaled, gate_up), rows, added)


def merge(
    x: Float[Array, "R F"],
    kernel: Float[Array, "F D"],
    residual: Float[Array, "R D"],
    gate: Float[Array, "D"] | TableRow | None,
    scale: Float[Array, "D"] | TableRow,
) -> Rows:
    """`kernels.merge`."""
    return add_scaled(residual, product(x, kernel), gate, scale)


def attend(
    query: Float[Array, "B S K H"],
    key: Float[Array, "B T 1 H"],
    value: Float[Array, "B T 1 H"],
    key_mask: Bool[Array, "B _"] | None,
) -> Float[Array, "B S K*H"]:
    """`kernels.attend`."""
    if key_mask is None:
        return layers.attend(query, key, value)
    batch, keys = key_mask.shape
    mask = jnp.broadcast_to(key_mask[:, None], (batch, query.shape[1], keys))
    return layers.attend(query, key[:, :keys], value[:, :keys], mask)


def embed_actions(
    noisy: Float[Array, "B H A"],
    kernel: Float[Array, "A E"],
    bias: Float[Array, "E"],
    scale: Float[Array, "E"] | TableRow,
    dtype: jnp.dtype,
) -> Rows:
    """`kernels.embed_actions`."""
    tokens = noisy.reshape(-1, len(kernel)) @ kernel + bias
    return scale_rows(tokens.astype(dtype), scale)


def euler_step(
    rows: Rows,
    scale: Float[Array, "E"] | TableRow,
    shift: Float[Array, "E"] | TableRow | None,
    kernel: Float[Array, "E A"],
    bias: Float[Array, "A"],
    noisy: Float[Array, "B H A"],
    step: float,
) -> Float[Array, "B H A"]:
    """`kernels.euler_step`."""
    wide = layers.wide(rows.x.dtype)
    normed = rows.x.astype(wide) * _factor(rows) * value_of(scale)
    normed = normed if shift is None else normed + value_of(shift)
    normed = normed.astype(rows.x.dtype).reshape(len(noisy), -1, len(kernel))
    actions = normed[:, -noisy.shape[1] :].astype(wide)
    return noisy + step * (actions @ kernel + bias)


def attend_patches(
    qkv: Float[Array, "B N 3*D"], bias: Float[Array, "3*D"] | TableRow, num_heads: int
) -> Float[Array, "B N D"]:
    """`kernels.attend_patches`."""
    return layers.attend(*split_bias(qkv, bias, num_heads))


def split_bias(
    x: Float[Array, "B N 3*D"], bias: Float[Array, "3*D"] | TableRow, num_heads: int
) -> tuple[Float[Array, "B N K H"], Float[Array, "B N K H"], Float[Array, "B N K H"]]:
    """`kernels.split_bias`."""
    packed = (x + value_of(bias)).reshape(*x.shape[:2], 3, num_heads, -1)
    query, key, value = jnp.moveaxis(packed, 2, 0)
    return query * query.shape[-1] ** -0.5, key, value


def gelu_bias(
    x: Float[Array, "B N F"], bias: Float[Array, "F"] | TableRow
) -> Float[Array, "B N F"]:
    """`kernels.gelu_bias`."""
    return layers.gelu(x + value_of(bias))


def add_layer_norm(
    x: Float[Array, "B N D"],
    y: Float[Array, "B N D"],
    bias: Float[Array, "D"] | TableRow,
    scale: Float[Array, "D"] | TableRow,
    shift: Float[Array, "D"] | TableRow,
    epsilon: float,
) -> tuple[Float[Array, "B N D"], Float[Array, "B N D"]]:
    """`kernels.add_layer_norm`."""
    total = x + (y + value_of(bias))
    return total, layer_norm(total, scale, shift, epsilon)


def layer_norm(
    x: Float[Array, "B N D"],
    scale: Float[Array, "D"] | TableRow,
    shift: Float[Array, "D"] | TableRow,
    epsilon: float,
) -> Float[Array, "B N D"]:
    """In `wide` precision; the first one of a tower, before which nothing is added."""
    wide = x.astype(layers.wide(x.dtype))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + epsilon) * value_of(scale) + value_of(shift)
    return normed.astype(x.dtype)


def _factor(rows: Rows) -> Float[Array, "R 1"]:
    """1 / rms."""
    mean = rows.squares.sum(axis=0)[:, None] / rows.x.shape[1]
    return jax.lax.rsqrt(mean + RMS_EPSILON)


def _normed(
    x: Float[Array, "R N"], rows: Rows, added: Float[Array, "N"] | TableRow | None
) -> Float[Array, "R N"]:
    """The norm's product with a kernel, of `rows.scaled`'s; in `wide` precision."""
    normed = x.astype(rows.squares.dtype) * _factor(rows)
    return normed if added is None else normed + value_of(added)


def _turned(
    x: Float[Array, "B S K H"], cos: Float[Array, "B S half"], sin: Float[Array, "B S half"]
) -> Float[Array, "B S K H"]:
    """RoPE over the halves of a head, in x's precision, which is `wide`."""
    first, second = jnp.split(x, 2, axis=-1)
    c, s = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * c - second * s, second * c + first * s], axis=-1)


def _written(
    room: Float[Array, "B T G H"] | jax.ShapeDtypeStruct, new: Float[Array, "B S G H"], place: int
) -> Float[Array, "B T G H"]:
    if isinstance(room, jax.ShapeDtypeStruct):
        room = jnp.zeros(room.shape, room.dtype)
    return jax.lax.dynamic_update_slice_in_dim(room, new.astype(room.dtype), place, axis=1)
