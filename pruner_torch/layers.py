"""The pieces both the vision tower and Gemma are built of.

Every layer computes in the dtype of what it is given and casts its parameters to that, so that the
same code runs float64, float32, bfloat16, and bfloat16 over float32 master weights.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from pruner_spec.sequence import MASKED_LOGIT
from pruner_torch.lora import Adapter

LAYER_NORM_EPSILON = 1e-6


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for what bfloat16 is too coarse for: float32, or float64 in a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def as_float(image: Shaped[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """An image in [-1, 1], which may be uint8."""
    is_bytes = image.dtype == torch.uint8
    image = image.to(dtype)
    return image / 255 * 2 - 1 if is_bytes else image


@torch.compiler.assume_constant_result
def constant(
    table: Callable[..., np.ndarray],
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Float[Tensor, "*shape"]:
    """A table of the spec, `table(*sizes, dtype's name)`, copied to the device once."""
    return _copied(table, sizes, dtype, device)


@functools.cache
def _copied(
    table: Callable[..., np.ndarray],
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Float[Tensor, "*shape"]:
    with torch.inference_mode(False):
        return torch.from_numpy(table(*sizes, str(dtype).removeprefix("torch."))).to(device)


def stack(make: Callable[[], nn.Module], layers: int) -> Any:
    """`layers` modules of one kind, one after the other: an `nn.ModuleList`, which is untyped."""
    return nn.ModuleList(make() for _ in range(layers))


class Linear(nn.Module):
    """y = x · kernel + bias, and what an adapter adds if there is one."""

    def __init__(
        self, inputs: int, outputs: int, *, use_bias: bool = True, lora: Adapter | None = None
    ) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if use_bias else None
        self.lora = lora

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = F.linear(x, self.kernel.to(x.dtype).T, bias)
        return y if self.lora is None else y + self.lora(x)


class LayerNorm(nn.Module):
    """Layer normalisation with scale and bias, computed in `wide` precision."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        dtype = wide(x.dtype)
        scale, bias = self.scale.to(dtype), self.bias.to(dtype)
        return F.layer_norm(x.to(dtype), scale.shape, scale, bias, LAYER_NORM_EPSILON).to(x.dtype)


def gelu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """GELU in its tanh approximation."""
    return F.gelu(x, approximate="tanh")


def attend(
    query: Float[Tensor, "B S K H"],
    key: Float[Tensor, "B T G H"],
    value: Float[Tensor, "B T G H"],
    mask: Bool[Tensor, "B S T"] | None = None,
) -> Float[Tensor, "B S K*H"]:
    """Softmax attention of queries that are scaled already; K is a multiple of G.

    Logits and softmax are in `wide` precision. A row with nothing to attend to averages all
    values, as in openpi.
    """
    heads_first = [x.transpose(1, 2) for x in (query, key, value)]
    # A finite number as large as this absorbs any logit, and leaves no row without a softmax: also
    # on a GPU, where it is multiplied by log2(e).
    bias = None
    if mask is not None:
        bias = torch.where(mask[:, None], 0.0, MASKED_LOGIT / 2).to(query.dtype)
    attended = F.scaled_dot_product_attention(
        *heads_first,
        attn_mask=bias,
        scale=1.0,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return attended.transpose(1, 2).flatten(2)
