"""Launches of `pruner_kernels`'s vision kernels: what stands between the products of a block."""

import jax
from jaxtyping import Array, Float

from pruner_jax import kernels_tables
from pruner_jax.tables import TableRow, arguments_of
from pruner_jax.triton_call import triton_call
from pruner_kernels.tiles import cdiv, patch_tiles, power_of_two


def attend_patches(
    qkv: Float[Array, "B N 3*D"], bias: Float[Array, "3*D"] | TableRow, num_heads: int
) -> Float[Array, "B N D"]:
    """`kernels.attend_patches`."""
    batch, count, outputs = qkv.shape
    width, head_dim = outputs // 3, outputs // 3 // num_heads
    tile = patch_tiles(count, head_dim)
    (out,) = triton_call(
        kernels_tables.attend_patches,
        {
            "qkv": qkv,
            **arguments_of("bias", bias),
            "out": jax.ShapeDtypeStruct((batch, count, width), qkv.dtype),
            "count": count,
            "SCALE": head_dim**-0.5,
            "HEADS": num_heads,
            "HEAD_DIM": head_dim,
            **tile,
        },
        grid=(cdiv(count, tile["ROWS"]), num_heads, batch),
    )
    return out


def split_bias(
    x: Float[Array, "B N 3*D"], bias: Float[Array, "3*D"] | TableRow, num_heads: int
) -> tuple[Float[Array, "B N K H"], Float[Array, "B N K H"], Float[Array, "B N K H"]]:
    """`kernels.split_bias`."""
    (batch, patches, outputs), width = x.shape, x.shape[2] // 3
    tile, grid = _area(batch * patches, width)
    part = jax.ShapeDtypeStruct((batch, patches, num_heads, width // num_heads), x.dtype)
    query, key, value = triton_call(
        kernels_tables.split_bias,
        {
            "x": x,
            **arguments_of("bias", bias),
            "query": part,
            "key": part,
            "value": part,
            "SCALE": (width // num_heads) ** -0.5,
            **tile,
        },
        grid=(*grid, outputs // width),
    )
    return query, key, value


def gelu_bias(
    x: Float[Array, "B N F"], bias: Float[Array, "F"] | TableRow
) -> Float[Array, "B N F"]:
    """`kernels.gelu_bias`."""
    tile, grid = _area(x.shape[0] * x.shape[1], x.shape[2])
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    arguments = {"x": x, **arguments_of("bias", bias), "out": out, **tile}
    (out,) = triton_call(kernels_tables.gelu_bias, arguments, grid=grid)
    return out


def add_layer_norm(
    x: Float[Array, "B N D"],
    y: Float[Array, "B N D"],
    bias: Float[Array, "D"] | TableRow,
    scale: Float[Array, "D"] | TableRow,
    shift: Float[Array, "D"] | TableRow,
    epsilon: float,
) -> tuple[Float[Array, "B N D"], Float[Array, "B N D"]]:
    """`kernels.add_layer_norm`."""
    (batch, patches, width), block = x.shape, power_of_two(x.shape[2])
    total, normed = triton_call(
        kernels_tables.add_layer_norm,
        {
            "x": x,
            "y": y,
            **arguments_of("bias", bias),
            **arguments_of("scale", scale),
            **arguments_of("shift", shift),
            "total": jax.ShapeDtypeStruct(x.shape, x.dtype),
            "normed": jax.ShapeDtypeStruct(x.shape, x.dtype),
            "WIDTH": width,
            "BLOCK": block,
            "EPSILON": epsilon,
        },
        grid=(batch * patches,),
        num_warps=min(max(block // 512, 1), 8),
    )
    return total, normed


def _area(rows: int, width: int) -> tuple[dict[str, int], tuple[int, int]]:
    """Tiles of a pointwise kernel, 16 elements a thread, and how many of them."""
    tile = {"ROWS": 16, "COLUMNS": min(power_of_two(width), 128)}
    grid = cdiv(rows, tile["ROWS"]), cdiv(width, tile["COLUMNS"])
    return {"rows": rows, "WIDTH": width, **tile}, grid
