"""What the kernels of `kernels` compute, in PyTorch's own operations: where they do not apply.

The same names and arguments; the letters and the checks are there.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pruner_torch import layers
from pruner_torch.gemma import RMS_EPSILON


def rms_normalize(
    x: Float[Tensor, "R D"],
    scale: Float[Tensor, "D"] | None,
    shift: Float[Tensor, "D"] | None,
) -> Float[Tensor, "R D"]:
    """`kernels.rms_normalize`."""
    y = x.to(layers.wide(x.dtype))
    y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + RMS_EPSILON)
    y = y if scale is None else y * scale
    y = y if shift is None else y + shift
    return y.to(x.dtype)


def rotate(
    qkv: Float[Tensor, "B S (K+2*G)*H"],
    cos: Float[Tensor, "B S H/2"],
    sin: Float[Tensor, "B S H/2"],
    num_heads: int,
    out_query: Float[Tensor, "B S K H"],
    out_key: Float[Tensor, "B S G H"],
    out_value: Float[Tensor, "B S G H"],
) -> None:
    """`kernels.rotate`."""
    heads = qkv.unflatten(-1, (-1, out_key.shape[-1]))
    query, key, value = heads.tensor_split([num_heads, num_heads + out_key.shape[2]], dim=2)
    for x, out in ((query, out_query), (key, out_key)):
        first, second = x.to(cos.dtype).chunk(2, dim=-1)
        c, s = cos[:, :, None], sin[:, :, None]
        out.copy_(torch.cat([first * c - second * s, second * c + first * s], dim=-1))
    out_value.copy_(value)


def gelu_product(gate_up: Float[Tensor, "R 2*F"]) -> Float[Tensor, "R F"]:
    """`kernels.gelu_product`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return layers.gelu(gate) * up


def dequantize(
    kernel: Float[Tensor, "D N"], kernel_scale: Float[Tensor, "N"] | None, dtype: torch.dtype
) -> Float[Tensor, "D N"]:
    """A kernel as the products use it."""
    if kernel_scale is None:
        return kernel.to(dtype)
    return (kernel.to(torch.float32) * kernel_scale).to(dtype)


def normed_linear(
    x: Float[Tensor, "R D"],
    scale: Float[Tensor, "D"] | None,
    shift: Float[Tensor, "D"] | None,
    kernel: Float[Tensor, "D N"],
    kernel_scale: Float[Tensor, "N"] | None = None,
) -> Float[Tensor, "R N"]:
    """`kernels.normed_linear`."""
    return rms_normalize(x, scale, shift) @ dequantize(kernel, kernel_scale, x.dtype)


def normed_rotated(
    x: Float[Tensor, "B S D"],
    scale: Float[Tensor, "D"] | None,
    shift: Float[Tensor, "D"] | None,
    kernel: Float[Tensor, "D outputs"],
    cos: Float[Tensor, "B S H/2"],
    sin: Float[Tensor, "B S H/2"],
    num_heads: int,
    out_query: Float[Tensor, "B S K H"],
    out_key: Float[Tensor, "B S G H"],
    out_value: Float[Tensor, "B S G H"],
    kernel_scale: Float[Tensor, "N"] | None = None,
) -> None:
    """`kernels.normed_rotated`."""
    qkv = normed_linear(x.flatten(0, 1), scale, shift, kernel, kernel_scale)
    qkv = qkv.unflatten(0, x.shape[:2])
    rotate(qkv, cos, sin, num_heads, out_query, out_key, out_value)


def normed_gated(
    x: Float[Tensor, "R D"],
    scale: Float[Tensor, "D"] | None,
    shift: Float[Tensor, "D"] | None,
    gate_up: Float[Tensor, "D 2*F"],
    kernel_scale: Float[Tensor, "2*F"] | None = None,
) -> Float[Tensor, "R F"]:
    """`kernels.normed_gated`."""
    return gelu_product(normed_linear(x, scale, shift, gate_up, kernel_scale))


def linear_residual(
    x: Float[Tensor, "R D"],
    kernel: Float[Tensor, "D N"],
    residual: Float[Tensor, "R N"],
    gate: Float[Tensor, "N"] | None,
    kernel_scale: Float[Tensor, "N"] | None = None,
) -> Float[Tensor, "R N"]:
    """`kernels.linear_residual`."""
    kernel = dequantize(kernel, kernel_scale, x.dtype)
    if gate is None:
        return torch.addmm(residual, x, kernel)
    return torch.addcmul(residual, x @ kernel, gate.to(x.dtype))


def attend(
    query: Float[Tensor, "B S K H"],
    key: Float[Tensor, "B T 1 H"],
    value: Float[Tensor, "B T 1 H"],
    key_mask: Bool[Tensor, "B T"] | None,
) -> Float[Tensor, "B S K*H"]:
    """`kernels.attend`."""
    mask = None
    if key_mask is not None:
        mask = key_mask[:, None].expand(-1, query.shape[1], -1)
    return layers.attend(query, key, value, mask)
