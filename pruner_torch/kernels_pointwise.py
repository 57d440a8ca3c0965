"""Triton: what is computed element by element, a row or a token a program.

Each reads its input once and writes its output once; a row of 2048 bfloat16 is 4 KiB, and a program
of 4 warps holds it in registers.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from pruner_torch.gemma import RMS_EPSILON
from pruner_torch.kernels_tiles import cdiv, power_of_two

jit: Any = triton.jit  # whose type has no grid's and no launch's arguments
EPSILON = tl.constexpr(RMS_EPSILON)
_overlap = False


def set_overlap(overlap: bool) -> None:
    """`kernels.set_overlap`."""
    global _overlap
    _overlap = overlap


def launch() -> dict[str, bool]:
    """Arguments of every launch."""
    return {"OVERLAP": True, "launch_pdl": True} if _overlap else {"OVERLAP": False}


@jit
def begin(OVERLAP: tl.constexpr):
    """What a kernel does before it reads or writes what a launch before it may have written.

    Overlapped, the next launch may start right away, and this one waits for the one before it.
    Each waits, and so none is done before all that came before it.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


@jit
def gelu(x):
    """GELU in its tanh approximation, of float32: 0.5 (1 + tanh(u)) is the sigmoid of 2 u."""
    u = 0.7978845608028654 * x * (1 + 0.044715 * x * x)
    return x / (1 + tl.exp(-2 * u))


@jit
def turn(first, second, cos, sin):
    """RoPE of a head's two halves, in float32."""
    return first * cos - second * sin, second * cos + first * sin


@jit
def _rms_normalize(
    x, scale, shift, out, x_stride,
    WIDTH: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < WIDTH
    y = tl.load(x + row * x_stride + i, mask=inside, other=0).to(tl.float32)
    y = y * tl.rsqrt(tl.sum(y * y, axis=0) / WIDTH + EPSILON)
    if HAS_SCALE:
        y *= tl.load(scale + i, mask=inside, other=0)
    if HAS_SHIFT:
        y += tl.load(shift + i, mask=inside, other=0)
    tl.store(out + row * WIDTH + i, y.to(out.dtype.element_ty), mask=inside)


def rms_normalize(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """`kernels.rms_normalize`."""
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    block = power_of_two(width)
    _rms_normalize[(rows,)](
        x, scale, shift, out, x.stride(0),
        WIDTH=width, HAS_SCALE=scale is not None, HAS_SHIFT=shift is not None, BLOCK=block,
        num_warps=min(max(block // 256, 1), 8), **launch(),
    )  # fmt: skip
    return out


@jit
def _rotate(
    qkv, cos, sin, query, key, value, length,
    qkv_batch, qkv_token, cos_batch, cos_token, sin_batch, sin_token,
    query_batch, query_token, query_head, key_batch, key_token, key_head,
    value_batch, value_token, value_head,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HALF: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One token, all heads: 10 heads of 256 bfloat16 are 5 KiB in and 5 KiB out."""
    begin(OVERLAP)
    batch = (tl.program_id(0) // length).to(tl.int64)
    token = tl.program_id(0) % length
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    i = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < QUERIES + 2 * KEYS) & (i < HALF)
    place = qkv + batch * qkv_batch + token * qkv_token + head * (2 * HALF) + i
    first = tl.load(place, mask=inside, other=0)
    second = tl.load(place + HALF, mask=inside, other=0)
    c = tl.load(cos + batch * cos_batch + token * cos_token + i, mask=i < HALF, other=0)
    s = tl.load(sin + batch * sin_batch + token * sin_token + i, mask=i < HALF, other=0)
    turned = turn(first.to(tl.float32), second.to(tl.float32), c, s)

    is_query = inside & (head < QUERIES)
    to = query + batch * query_batch + token * query_token + head * query_head + i
    tl.store(to, turned[0].to(first.dtype), mask=is_query)
    tl.store(to + HALF, turned[1].to(first.dtype), mask=is_query)
    is_key = inside & (head >= QUERIES) & (head < QUERIES + KEYS)
    to = key + batch * key_batch + token * key_token + (head - QUERIES) * key_head + i
    tl.store(to, turned[0].to(first.dtype), mask=is_key)
    tl.store(to + HALF, turned[1].to(first.dtype), mask=is_key)
    is_value = inside & (head >= QUERIES + KEYS)
    to = value + batch * value_batch + token * value_token
    to += (head - QUERIES - KEYS) * value_head + i
    tl.store(to, first, mask=is_value)
    tl.store(to + HALF, second, mask=is_value)


def rotate(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    out_query: Tensor,
    out_key: Tensor,
    out_value: Tensor,
) -> None:
    """`kernels.rotate`."""
    batch, length, groups, head_dim = out_key.shape
    _rotate[(batch * length,)](
        qkv, cos, sin, out_query, out_key, out_value, length,
        *qkv.stride()[:2], *cos.stride()[:2], *sin.stride()[:2],
        *out_query.stride()[:3], *out_key.stride()[:3], *out_value.stride()[:3],
        QUERIES=num_heads, KEYS=groups, HALF=head_dim // 2,
        HEADS_BLOCK=power_of_two(num_heads + 2 * groups),
        HALF_BLOCK=power_of_two(head_dim // 2),
        num_warps=4, **launch(),
    )  # fmt: skip


@jit
def _gelu_product(
    gate_up, out, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < WIDTH
    gate = tl.load(gate_up + row * stride + i, mask=inside, other=0)
    up = tl.load(gate_up + row * stride + WIDTH + i, mask=inside, other=0)
    # Rounded where the plain path rounds.
    activated = gelu(gate.to(tl.float32)).to(gate.dtype)
    product = activated.to(tl.float32) * up.to(tl.float32)
    tl.store(out + row * WIDTH + i, product.to(gate.dtype), mask=inside)


def gelu_product(gate_up: Tensor) -> Tensor:
    """`kernels.gelu_product`."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    # 8 elements, 16 bytes, a thread of each half: 4 programs a row of F = 4096, 16 of 16384.
    block = min(power_of_two(width), 1024)
    grid = (rows, cdiv(width, block))
    _gelu_product[grid](
        gate_up, out, gate_up.stride(0), WIDTH=width, BLOCK=block,
        num_warps=max(block // 256, 1), **launch(),
    )  # fmt: skip
    return out
