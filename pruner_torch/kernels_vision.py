"""Launches of `pruner_kernels.vision`."""

import torch
from jaxtyping import Float
from torch import Tensor

from pruner_kernels import vision
from pruner_kernels.tiles import cdiv, patch_tiles, power_of_two


def attend_patches(qkv: Float[Tensor, "B N 3*D"], num_heads: int) -> Float[Tensor, "B N D"]:
    """`kernels.attend_patches`."""
    batch, count, outputs = qkv.shape
    width, head_dim = outputs // 3, outputs // 3 // num_heads
    tile = patch_tiles(count, head_dim)
    out = qkv.new_empty(batch, count, width)
    vision.attend_patches[(cdiv(count, tile["ROWS"]), num_heads, batch)](
        qkv.contiguous(), None, out, count, SCALE=head_dim**-0.5, HEADS=num_heads,
        HEAD_DIM=head_dim, HAS_BIAS=False, **tile, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


def add_layer_norm(
    x: Float[Tensor, "*batch D"],
    y: Float[Tensor, "*batch D"],
    scale: Float[Tensor, "D"],
    shift: Float[Tensor, "D"],
    epsilon: float,
) -> tuple[Float[Tensor, "*batch D"], Float[Tensor, "*batch D"]]:
    """`kernels.add_layer_norm`."""
    rows, others = (each.reshape(-1, x.shape[-1]) for each in (x, y))
    total, normed = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    block = power_of_two(x.shape[-1])
    # 16 elements a thread, of which 9 are there at a width of 1152.
    vision.add_layer_norm[(len(rows),)](
        rows, others, None, scale, shift, total, normed, rows.stride(0), others.stride(0),
        WIDTH=x.shape[-1], HAS_BIAS=False, BLOCK=block, EPSILON=epsilon,
        num_warps=min(max(block // 512, 1), 8),
    )  # fmt: skip
    return total, normed
