"""What the kernels of `kernels` compute, in PyTorch's own operations: where they do not apply.

The same names and arguments; the letters and the checks are there.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from pruner_kernels.few_rows import packed_shape, queries_shape
from pruner_torch import layers
from pruner_torch.float8 import Quantized, multiply, quantize_rows
from pruner_torch.gemma import RMS_EPSILON


@dataclasses.dataclass(frozen=True)
class Rows:
    """Hidden states on their way to a norm.

    With r = 1 / rms(x), a norm times a kernel is r · ((x · scale) kernel) + shift kernel. Who
    writes x writes what the product needs beside it; r and the shift's product come after it.

    Attributes:
        x: of R tokens.
        scaled: x times the norm's scale, for some products packed, [D/32, 4, N, 8]: see `pack`.
        squares: the sum of each row's squares, in P parts; in `wide` precision.
    """

    x: Float[Tensor, "R D"]
    scaled: Tensor
    squares: Float[Tensor, "P R"]


@dataclasses.dataclass(frozen=True)
class PackedQuery:
    """Queries as `attend` takes them beside packed rows: in tiles of (token, head) pairs.

    Attributes:
        packed: see `pack_query`.
        length: tokens of a sample.
        heads: K.
    """

    packed: Float[Tensor, "B tiles H/32 4 16 8"]
    length: int
    heads: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[B, S, K, H]."""
        return self.packed.shape[0], self.length, self.heads, 32 * self.packed.shape[2]


def packs(rows: int, layer: Any, head_dim: int, actions: int) -> bool:
    """`kernels.packs`: a library takes rows as they are."""
    return False


def pack(x: Float[Tensor, "R D"]) -> Float[Tensor, "D/32 4 N 8"]:
    """Rows as `pruner_kernels/few_rows.cu` reads them; the R up to a multiple of 8 are N."""
    rows, width = x.shape
    groups, _, count, _ = packed_shape(rows, width)
    padded = F.pad(x, (0, 0, 0, count - rows)).view(count, groups, 4, 4, 2)
    return padded.permute(1, 3, 0, 2, 4).reshape(groups, 4, count, 8)


def unpack(x: Tensor, rows: int) -> Float[Tensor, "R D"]:
    """The R rows, whether they are packed or not."""
    if not is_packed(x):
        return x
    groups, _, count, _ = x.shape
    apart = x.view(groups, 4, count, 4, 2).permute(2, 0, 3, 1, 4)
    return apart.reshape(count, groups * 32)[:rows]


def is_packed(x: Tensor) -> bool:
    return x.ndim == 4


def pack_query(query: Float[Tensor, "B S K H"]) -> PackedQuery:
    """Each tile's (token, head) pairs as `pack` has rows."""
    batch, length, heads, head_dim = query.shape
    _, tiles, *_, tile, _ = queries_shape(*query.shape)
    pairs = query.reshape(batch, length * heads, head_dim)
    pairs = F.pad(pairs, (0, 0, 0, tiles * tile - length * heads))
    packed = torch.stack([pack(each) for each in pairs.reshape(-1, tile, head_dim)])
    return PackedQuery(packed.view(queries_shape(*query.shape)), length, heads)


def unpack_query(query: PackedQuery) -> Float[Tensor, "B S K H"]:
    batch, tiles, groups, _, tile, _ = query.packed.shape
    each = [unpack(x, tile) for x in query.packed.flatten(0, 1)]
    pairs = torch.stack(each).view(batch, tiles * tile, 32 * groups)
    return pairs[:, : query.length * query.heads].reshape(batch, query.length, query.heads, -1)


def product(
    x: Float[Tensor, "R D"], kernel: Float[Tensor, "D N"] | Quantized
) -> Float[Tensor, "R N"]:
    """A library's; of a kernel in float8, so are the rows."""
    if isinstance(kernel, Quantized):
        return multiply(quantize_rows(x), kernel, x.dtype)
    return x @ kernel


def scale_rows(x: Float[Tensor, "R D"], scale: Float[Tensor, "D"]) -> Rows:
    """`kernels.scale_rows`."""
    wide = x.to(layers.wide(x.dtype))
    return Rows(x, (wide * scale).to(x.dtype), wide.square().sum(dim=-1)[None])


def project(
    rows: Rows,
    kernel: Float[Tensor, "D N"],
    added: Float[Tensor, "N"] | None,
    cos: Float[Tensor, "B S half"],
    sin: Float[Tensor, "B S half"],
    key: Float[Tensor, "B T G H"],
    value: Float[Tensor, "B T G H"],
    place: int,
    num_heads: int,
) -> tuple[Float[Tensor, "B S K H"], Float[Tensor, "B T G H"], Float[Tensor, "B T G H"]]:
    """`kernels.project`."""
    batch, length = cos.shape[:2]
    groups, head_dim = key.shape[2:]
    heads = _normed(rows, kernel, added).reshape(batch, length, -1, head_dim)
    query, new_key, new_value = heads.split([num_heads, groups, groups], dim=2)
    key[:, place : place + length] = _turned(new_key, cos, sin)
    value[:, place : place + length] = new_value
    return _turned(query, cos, sin).to(key.dtype), key, value


def gated(
    rows: Rows, gate_up: Float[Tensor, "D 2*F"] | Quantized, added: Float[Tensor, "2*F"] | None
) -> Tensor:
    """`kernels.gated`."""
    gate, up = _normed(rows, gate_up, added).chunk(2, dim=-1)
    out = (layers.gelu(gate) * up).to(rows.x.dtype)
    return pack(out) if is_packed(rows.scaled) else out


def merge(
    x: Tensor,
    kernel: Float[Tensor, "F D"] | Quantized,
    residual: Float[Tensor, "R D"],
    gate: Float[Tensor, "D"] | None,
    scale: Float[Tensor, "D"],
) -> Rows:
    """`kernels.merge`."""
    added = product(unpack(x, len(residual)), kernel).to(layers.wide(x.dtype))
    added = added if gate is None else added * gate
    return _scaled_as(is_packed(x), scale_rows((residual + added).to(residual.dtype), scale))


def attend(
    query: Float[Tensor, "B S K H"] | PackedQuery,
    key: Float[Tensor, "B T 1 H"],
    value: Float[Tensor, "B T 1 H"],
    key_mask: Bool[Tensor, "B T"] | None,
    packed: bool = False,
) -> Tensor:
    """`kernels.attend`."""
    query = unpack_query(query) if isinstance(query, PackedQuery) else query
    mask = None
    if key_mask is not None:
        mask = key_mask[:, None].expand(-1, query.shape[1], -1)
    out = layers.attend(query, key, value, mask)
    return pack(out.flatten(0, 1)) if packed else out


def embed_actions(
    noisy: Float[Tensor, "B H A"],
    kernel: Float[Tensor, "A E"],
    bias: Float[Tensor, "E"],
    scale: Float[Tensor, "E"],
    dtype: torch.dtype,
    packed: bool = False,
) -> Rows:
    """`kernels.embed_actions`."""
    rows = scale_rows(torch.addmm(bias, noisy.flatten(0, 1), kernel).to(dtype), scale)
    return _scaled_as(packed, rows)


def euler_step(
    rows: Rows,
    scale: Float[Tensor, "E"],
    shift: Float[Tensor, "E"] | None,
    kernel: Float[Tensor, "E A"],
    bias: Float[Tensor, "A"],
    noisy: Float[Tensor, "B H A"],
    step: float,
) -> Float[Tensor, "B H A"]:
    """`kernels.euler_step`."""
    wide = layers.wide(rows.x.dtype)
    normed = rows.x.to(wide) * _factor(rows) * scale
    normed = normed if shift is None else normed + shift
    actions = normed.to(rows.x.dtype).reshape(len(noisy), -1, len(kernel))[:, -noisy.shape[1] :]
    return noisy + step * (actions.to(wide) @ kernel + bias)


def attend_patches(qkv: Float[Tensor, "B N 3*D"], num_heads: int) -> Float[Tensor, "B N D"]:
    """`kernels.attend_patches`."""
    query, key, value = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def add_layer_norm(
    x: Float[Tensor, "*batch D"],
    y: Float[Tensor, "*batch D"],
    scale: Float[Tensor, "D"],
    shift: Float[Tensor, "D"],
    epsilon: float,
) -> tuple[Float[Tensor, "*batch D"], Float[Tensor, "*batch D"]]:
    """`kernels.add_layer_norm`."""
    total = x + y
    return total, F.layer_norm(total, scale.shape, scale, shift, epsilon)


def _scaled_as(packed: bool, rows: Rows) -> Rows:
    return dataclasses.replace(rows, scaled=pack(rows.scaled)) if packed else rows


def _factor(rows: Rows) -> Float[Tensor, "R 1"]:
    """1 / rms."""
    mean = rows.squares.sum(dim=0)[:, None] / rows.x.shape[1]
    return torch.rsqrt(mean + RMS_EPSILON)


def _normed(
    rows: Rows, kernel: Float[Tensor, "D N"] | Quantized, added: Float[Tensor, "N"] | None
) -> Float[Tensor, "R N"]:
    """The norm's product with a kernel, in `wide` precision."""
    scaled = unpack(rows.scaled, len(rows.x))
    normed = product(scaled, kernel).to(rows.squares.dtype) * _factor(rows)
    return normed if added is None else normed + added


def _turned(
    x: Float[Tensor, "B S K H"],
    cos: Float[Tensor, "B S half"],
    sin: Float[Tensor, "B S half"],
) -> Float[Tensor, "B S K H"]:
    """RoPE over the halves of a head, in x's precision, which is `wide`."""
    first, second = x.chunk(2, dim=-1)
    c, s = cos[:, :, None], sin[:, :, None]
    return torch.cat([first * c - second * s, second * c + first * s], dim=-1)
