"""Launches of `pruner_triton`'s vision kernels: what stands between the products of a block."""

import jax
from jaxtyping import Array, Float

from pruner_jax.triton_call import triton_call
from pruner_triton import vision
from pruner_triton.tiles import cdiv, power_of_two


def split_bias(
    x: Float[Array, "B N 3*D"], bias: Float[Array, "3*D"], num_heads: int
) -> tuple[Float[Array, "B N K H"], Float[Array, "B N K H"], Float[Array, "B N K H"]]:
    """`kernels.split_bias`."""
    (batch, patches, outputs), width = x.shape, x.shape[2] // 3
    tile, grid = _area(batch * patches, width)
    part = jax.ShapeDtypeStruct((batch, patches, num_heads, width // num_heads), x.dtype)
    query, key, value = triton_call(
        vision.split_bias,
        {
            "x": x,
            "bias": bias,
            "query": part,
            "key": part,
            "value": part,
            "SCALE": (width // num_heads) ** -0.5,
            **tile,
        },
        grid=(*grid, outputs // width),
    )
    return query, key, value


def gelu_bias(x: Float[Array, "B N F"], bias: Float[Array, "F"]) -> Float[Array, "B N F"]:
    """`kernels.gelu_bias`."""
    tile, grid = _area(x.shape[0] * x.shape[1], x.shape[2])
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    (out,) = triton_call(vision.gelu_bias, {"x": x, "bias": bias, "out": out, **tile}, grid=grid)
    return out


def add_layer_norm(
    x: Float[Array, "B N D"],
    y: Float[Array, "B N D"],
    bias: Float[Array, "D"],
    scale: Float[Array, "D"],
    shift: Float[Array, "D"],
    epsilon: float,
) -> tuple[Float[Array, "B N D"], Float[Array, "B N D"]]:
    """`kernels.add_layer_norm`."""
    (batch, patches, width), block = x.shape, power_of_two(x.shape[2])
    total, normed = triton_call(
        vision.add_layer_norm,
        {
            "x": x,
            "y": y,
            "bias": bias,
            "scale": scale,
            "shift": shift,
            "total": jax.ShapeDtypeStruct(x.shape, x.dtype),
            "normed": jax.ShapeDtypeStruct(x.shape, x.dtype),
            "x_stride": width,
            "y_stride": width,
            "WIDTH": width,
            "HAS_BIAS": True,
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
