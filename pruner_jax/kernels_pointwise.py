"""Launches of `pruner_kernels.pointwise`: what stands around a library's products of many rows.

Sizes and strides are constants of what is compiled: another length of the prefix compiles `rotate`
and `gelu_product` anew.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pruner_jax import kernels_tables
from pruner_jax.kernels_plain import Rows
from pruner_jax.tables import TableRow, arguments_of
from pruner_jax.triton_call import triton_call
from pruner_kernels.tiles import cdiv, power_of_two

Vector = Float[Array, "N"] | TableRow | None
Room = Float[Array, "B T G H"] | jax.ShapeDtypeStruct


def rotate(
    qkv: Float[Array, "R N"],
    given: Rows,
    added: Vector,
    cos: Float[Array, "B S half"],
    sin: Float[Array, "B S half"],
    key: Room,
    value: Room,
    place: int,
    num_heads: int,
) -> tuple[Float[Array, "B S K H"], Float[Array, "B T G H"], Float[Array, "B T G H"]]:
    """`kernels.rotate`."""
    (batch, length), (_, room, groups, head_dim) = cos.shape[:2], key.shape
    shape = (batch, length, num_heads, head_dim)
    rooms: dict[str, Any] = {"key": key, "value": value}
    is_new = isinstance(key, jax.ShapeDtypeStruct)
    *queries, key, value = triton_call(
        kernels_tables.rotate,
        {
            "qkv": qkv,
            **_normed(given, added),
            "cos": cos,
            "sin": sin,
            "query": jax.ShapeDtypeStruct(shape, key.dtype) if num_heads else None,
            **(rooms if is_new else {}),
            "COUNT": batch * length,
            "LENGTH": length,
            "ROOM": room,
            "PLACE": place,
            "QUERIES": num_heads,
            "KEYS": groups,
            "HALF": head_dim // 2,
            "HEADS_BLOCK": power_of_two(num_heads + 2 * groups),
            "HALF_BLOCK": power_of_two(head_dim // 2),
        },
        grid=(batch * length,),
        aliases={} if is_new else rooms,
    )
    (query,) = queries or [jnp.zeros(shape, key.dtype)]
    return query, key, value


def gelu_product(gate_up: Float[Array, "R 2*F"], given: Rows, added: Vector) -> Float[Array, "R F"]:
    """`kernels.gelu_product`."""
    count, width = len(gate_up), gate_up.shape[1] // 2
    # 8 elements, 16 bytes, a thread of each half: 4 programs a row of F = 4096, 16 of 16384.
    block = min(power_of_two(width), 1024)
    (out,) = triton_call(
        kernels_tables.gelu_product,
        {
            "gate_up": gate_up,
            **_normed(given, added),
            "out": jax.ShapeDtypeStruct((count, width), given.x.dtype),
            "COUNT": count,
            "WIDTH": width,
            "BLOCK": block,
        },
        grid=(count, cdiv(width, block)),
        num_warps=max(block // 256, 1),
    )
    return out


def add_scaled(
    x: Float[Array, "R D"], added: Float[Array, "R D"] | None, gate: Vector, scale: Vector
) -> Rows:
    """`kernels.add_scaled`; `kernels.scale_rows` where nothing is added."""
    (count, width), block = x.shape, power_of_two(x.shape[1])
    like_x = jax.ShapeDtypeStruct(x.shape, x.dtype)
    *sums, scaled, squares = triton_call(
        kernels_tables.add_scaled,
        {
            "x": x,
            "y": added,
            **arguments_of("gate", gate),
            **arguments_of("scale", scale),
            "out": None if added is None else like_x,
            "scaled": like_x,
            "squares": jax.ShapeDtypeStruct((1, count), jnp.float32),
            "WIDTH": width,
            "HAS_SUM": added is not None,
            "HAS_GATE": gate is not None,
            "BLOCK": block,
        },
        grid=(count,),
        num_warps=min(max(block // 256, 1), 8),
    )
    (out,) = sums or [x]
    return Rows(out, scaled, squares)


def _normed(given: Rows, added: Vector) -> dict[str, Any]:
    """Arguments of what comes after a norm's product."""
    parts = len(given.squares)
    return {
        "squares": given.squares,
        **arguments_of("added", added),
        "HAS_ADDED": added is not None,
        "INPUTS": given.x.shape[1],
        "PARTS": parts,
        "PARTS_BLOCK": power_of_two(parts),
    }
