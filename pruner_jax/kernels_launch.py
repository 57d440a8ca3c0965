"""Launches of `pruner_kernels`'s kernels: results are named, tiles chosen, vectors found in tables.

Names and arguments are those of `kernels`. Sizes and strides are constants of what is compiled:
another length of the prefix compiles `project` and `attend` anew.

Programs of a launch that share a tile count themselves in zeros that they leave as zeros. So one
constant serves every launch: they run one after another, and XLA need not know that it is written.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pruner_jax import kernels_tables as tables
from pruner_jax.kernels_plain import Rows
from pruner_jax.tables import TableRow
from pruner_jax.triton_call import capability, triton_call
from pruner_kernels import attention
from pruner_kernels.tiles import (
    COUNTERS,
    HOPPER,
    Tiles,
    attention_tiles,
    cdiv,
    power_of_two,
    product_tiles,
    row_block,
)

Vector = Float[Array, "N"] | TableRow | None


def project(
    given: Rows,
    kernel: Float[Array, "D N"],
    added: Vector,
    cos: Float[Array, "B S half"],
    sin: Float[Array, "B S half"],
    key: Float[Array, "B T G H"],
    value: Float[Array, "B T G H"],
    place: int,
    num_heads: int,
) -> tuple[Float[Array, "B S K H"], Float[Array, "B T G H"], Float[Array, "B T G H"]]:
    """`kernels.project`."""
    (batch, length), (_, room, groups, head_dim) = cos.shape[:2], key.shape
    x, (inputs, outputs) = given.scaled, kernel.shape
    tiles = _tiles("project", x, inputs, outputs)
    query, key, value = triton_call(
        tables.project,
        {
            **_normed(given, kernel, added),
            "cos": cos,
            "sin": sin,
            "query": jax.ShapeDtypeStruct((batch, length, num_heads, head_dim), x.dtype),
            "LENGTH": length,
            "ROOM": room,
            "PLACE": place,
            "QUERIES": num_heads,
            "KEYS": groups,
            "HALF": head_dim // 2,
            **_cut(tiles, x),
        },
        grid=(outputs // tiles.columns, cdiv(len(x), row_block(len(x)))),
        aliases={"key": key, "value": value},
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return query, key, value


def gated(given: Rows, gate_up: Float[Array, "D 2*F"], added: Vector) -> Float[Array, "R F"]:
    """`kernels.gated`."""
    x, (inputs, outputs) = given.scaled, gate_up.shape
    tiles = _tiles("gated", x, inputs, outputs)
    (out,) = triton_call(
        tables.gated,
        {
            **_normed(given, gate_up, added),
            "out": jax.ShapeDtypeStruct((len(x), outputs // 2), x.dtype),
            "OUTPUTS": outputs // 2,
            **_cut(tiles, x),
        },
        grid=(cdiv(outputs, tiles.columns), cdiv(len(x), row_block(len(x)))),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out


def merge(
    x: Float[Array, "R F"],
    kernel: Float[Array, "F D"],
    residual: Float[Array, "R D"],
    gate: Vector,
    scale: Vector,
) -> Rows:
    """`kernels.merge`."""
    rows, (inputs, outputs) = len(x), kernel.shape
    tiles, block = _tiles("merge", x, inputs, outputs), row_block(rows)
    blocks = cdiv(outputs, tiles.columns), cdiv(rows, block)
    is_shared = tiles.parts > 1
    # 4 parts of 64 × 1024 float32 are 1 MiB, which does not leave the L2 cache.
    area = blocks[0] * blocks[1] * tiles.parts * block * tiles.columns
    (gate_table, gate_stride), (scale_table, scale_stride) = _table(gate), _table(scale)
    out, scaled, squares, *_ = triton_call(
        tables.merge,
        {
            "x": x,
            "kernel": kernel.T,
            "residual": residual,
            "gate": gate_table,
            "scale": scale_table,
            "step": _step(gate, scale),
            "counters": _counters() if is_shared else None,
            "out": jax.ShapeDtypeStruct((rows, outputs), x.dtype),
            "scaled": jax.ShapeDtypeStruct((rows, outputs), x.dtype),
            "squares": _floats(blocks[0], rows),
            "partials": _floats(area) if is_shared else None,
            "GATE_STRIDE": gate_stride,
            "SCALE_STRIDE": scale_stride,
            "COUNT": rows,
            "INPUTS": inputs,
            "OUTPUTS": outputs,
            "HAS_GATE": gate is not None,
            "PARTS": tiles.parts,
            **_cut(tiles, x),
        },
        grid=(blocks[0], tiles.parts, blocks[1]),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return Rows(out, scaled, squares)


def attend(
    query: Float[Array, "B S K H"],
    key: Float[Array, "B T 1 H"],
    value: Float[Array, "B T 1 H"],
    key_mask: Bool[Array, "B _"] | None,
) -> Float[Array, "B S K*H"]:
    """`kernels.attend`."""
    (batch, length, heads, head_dim), room = query.shape, key.shape[1]
    keys = room if key_mask is None else key_mask.shape[1]
    rows = length * heads
    tiles = attention_tiles(batch, rows, keys, query.dtype.itemsize, shared_memory())
    span = cdiv(cdiv(keys, tiles.parts), tiles.keys) * tiles.keys
    parts = cdiv(keys, span)  # none is empty
    width, blocks = max(power_of_two(head_dim), 16), cdiv(rows, tiles.rows)
    shared = batch * blocks * parts * tiles.rows
    is_shared = parts > 1
    out, *_ = triton_call(
        attention.attend,
        {
            "query": query,
            "key": key,
            "value": value,
            "mask": key_mask,
            "out": jax.ShapeDtypeStruct((batch, length, heads * head_dim), query.dtype),
            "tops": _floats(shared) if is_shared else None,
            "sums": _floats(shared) if is_shared else None,
            "totals": _floats(shared * width) if is_shared else None,
            "counters": _counters() if is_shared else None,
            "length": length,
            "keys": keys,
            "span": span,
            "query_batch": rows * head_dim,
            "query_token": heads * head_dim,
            "query_head": head_dim,
            "key_batch": room * head_dim,
            "key_token": head_dim,
            "value_batch": room * head_dim,
            "value_token": head_dim,
            "mask_batch": keys,
            "mask_token": 1,
            "HEADS": heads,
            "HEAD_DIM": head_dim,
            "HAS_MASK": key_mask is not None,
            "ROWS": tiles.rows,
            "KEYS": tiles.keys,
            "WIDTH": width,
            "PARTS": parts,
            "PACKED": 0,
        },
        grid=(blocks, parts, batch),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out


def embed_actions(
    noisy: Float[Array, "R A"],
    kernel: Float[Array, "A E"],
    bias: Float[Array, "E"],
    scale: Vector,
    dtype: jnp.dtype,
) -> Rows:
    """`kernels.embed_actions`."""
    rows, (actions, width) = len(noisy), kernel.shape
    table, stride = _table(scale)
    x, scaled, squares = triton_call(
        tables.embed_actions,
        {
            "noisy": noisy,
            "kernel": kernel,
            "bias": bias,
            "scale": table,
            "step": _step(scale),
            "out": jax.ShapeDtypeStruct((rows, width), dtype),
            "scaled": jax.ShapeDtypeStruct((rows, width), dtype),
            "squares": _floats(1, rows),
            "SCALE_STRIDE": stride,
            "WIDTH": width,
            "ACTIONS": actions,
            "ACTIONS_BLOCK": power_of_two(actions),
            "BLOCK": power_of_two(width),
        },
        grid=(rows,),
        num_warps=8,
    )
    return Rows(x, scaled, squares)


def euler_step(
    given: Rows,
    scale: Vector,
    shift: Vector,
    kernel: Float[Array, "E A"],
    bias: Float[Array, "A"],
    noisy: Float[Array, "B H A"],
    step: float,
) -> Float[Array, "B H A"]:
    """`kernels.euler_step`."""
    (batch, horizon, actions), (rows, width) = noisy.shape, given.x.shape
    (scale_table, scale_stride), (shift_table, shift_stride) = _table(scale), _table(shift)
    (out,) = triton_call(
        tables.euler_step,
        {
            "x": given.x,
            "squares": given.squares,
            "scale": scale_table,
            "shift": shift_table,
            "now": _step(scale, shift),
            "kernel": kernel,
            "bias": bias,
            "SCALE_STRIDE": scale_stride,
            "SHIFT_STRIDE": shift_stride,
            "COUNT": rows,
            "STEP": step,
            "WIDTH": width,
            "ACTIONS": actions,
            "ACTIONS_BLOCK": power_of_two(actions),
            "LENGTH": rows // batch,
            "HORIZON": horizon,
            **_parts(given.squares),
            "INNER": min(power_of_two(width), 1024),
            "HAS_SHIFT": shift is not None,
        },
        grid=(batch * horizon,),
        aliases={"noisy": noisy},
        num_warps=8,
    )
    return out


def _normed(given: Rows, kernel: Float[Array, "D N"], added: Vector) -> dict[str, Any]:
    """Arguments of a product with a norm. In memory the kernel's outputs lie first."""
    table, stride = _table(added)
    return {
        "x": given.scaled,
        "squares": given.squares,
        "kernel": kernel.T,
        "added": table,
        "step": _step(added),
        "ADDED_STRIDE": stride,
        "HAS_ADDED": added is not None,
        "COUNT": len(given.x),
        "INPUTS": len(kernel),
        **_parts(given.squares),
    }


def _table(vector: Vector) -> tuple[Array | None, int]:
    """What a kernel is given of a vector, and how far apart two rows are in it."""
    if isinstance(vector, TableRow):
        return vector.table, vector.table.shape[1]
    return vector, 0


def _step(*vectors: Vector) -> Int[Array, ""] | np.ndarray | None:
    """The row of all tables that a launch is given: its step; None where there is no table."""
    return next((vector.place for vector in vectors if isinstance(vector, TableRow)), None)


def _tiles(name: str, x: Float[Array, "R D"], inputs: int, outputs: int) -> Tiles:
    return product_tiles(name, len(x), inputs, outputs, x.dtype.itemsize, shared_memory())


def _cut(tiles: Tiles, x: Float[Array, "R D"]) -> dict[str, int]:
    return {"ROWS": row_block(len(x)), "COLUMNS": tiles.columns, "INNER": tiles.inner}


def _parts(squares: Float[Array, "P R"]) -> dict[str, int]:
    return {"PARTS": len(squares), "PARTS_BLOCK": power_of_two(len(squares))}


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _counters() -> Int[Array, "counters"]:
    return jnp.zeros(COUNTERS, jnp.int32)


def shared_memory() -> int:
    """Bytes that a program may have for itself."""
    if capability() >= 90 and capability() < 120:
        return HOPPER
    return (163 if capability() == 80 else 99) << 10
