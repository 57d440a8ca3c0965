"""Gemma with two experts that attend jointly: the language model and the action expert.

The prefix (image and prompt tokens) runs through the language model, the suffix (action tokens)
through the action expert. A layer concatenates the queries, keys and values of both along the
sequence, attends, and splits again; every other weight is the expert's own.

Dimension letters: B batch, S prefix, H suffix, D width, K heads, G kv heads, L layers.
"""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pruner_spec.config import GemmaVariant, Pi0Config
from pruner_spec.sequence import rope_timescales
from pruner_spec.training import GradientCheckpointing
from pruner_torch.layers import Linear, attend, constant, gelu, stack, wide
from pruner_torch.lora import Adapter
from pruner_torch.recomputation import layer_function

RMS_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (after RoPE) and values of the prefix, all layers: [L, B, S, G, head_dim]."""

    key: Float[Tensor, "L B S G head_dim"]
    value: Float[Tensor, "L B S G head_dim"]


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Cosines and sines of RoPE's angles, [B, S, 1, head_dim / 2], the same for all layers."""

    cos: Float[Tensor, "B S 1 half"]
    sin: Float[Tensor, "B S 1 half"]


def rotary(positions: Int[Tensor, "B S"], head_dim: int, dtype: torch.dtype) -> Rotary:
    """The angles of the positions, in `wide` precision."""
    timescales = constant(rope_timescales, (head_dim,), wide(dtype), positions.device)
    angles = positions[..., None, None] / timescales
    return Rotary(cos=angles.cos(), sin=angles.sin())


def rotate(x: Float[Tensor, "B S K H"], rotary: Rotary) -> Float[Tensor, "B S K H"]:
    """RoPE over the two halves of the head dimension, not interleaved."""
    first, second = x.to(rotary.cos.dtype).chunk(2, dim=-1)
    turned = (
        first * rotary.cos - second * rotary.sin,
        second * rotary.cos + first * rotary.sin,
    )
    return torch.cat(turned, dim=-1).to(x.dtype)


class RMSNorm(nn.Module):
    """x over its root mean square, times one plus the scale; no gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width))

    def forward(
        self, x: Float[Tensor, "B S D"], condition: Float[Tensor, "B D"] | None
    ) -> tuple[Float[Tensor, "B S D"], None]:
        normed = _rms_normalize(x)
        return (normed * (1 + self.scale.to(normed.dtype))).to(x.dtype), None


class AdaptiveRMSNorm(nn.Module):
    """An RMS norm whose scale and shift, and the gate of the residual, depend on a condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = Linear(width, 3 * width)

    def forward(
        self, x: Float[Tensor, "B S D"], condition: Float[Tensor, "B D"] | None
    ) -> tuple[Float[Tensor, "B S D"], Float[Tensor, "B 1 D"]]:
        assert condition is not None
        scale, shift, gate = self.modulation(condition)[:, None].chunk(3, dim=-1)
        normed = _rms_normalize(x)
        return (normed * (1 + scale) + shift).to(x.dtype), gate.to(x.dtype)


def _rms_normalize(x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
    x = x.to(wide(x.dtype))
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + RMS_EPSILON)


def _projection(name: str, variant: GemmaVariant, inputs: int, outputs: int) -> Linear:
    """One of an expert's kernels, without a bias, and its adapter if the expert has any."""
    lora = None if variant.lora is None else Adapter(name, variant)
    return Linear(inputs, outputs, use_bias=False, lora=lora)


class Attention(nn.Module):
    """One expert's projections of the joint attention."""

    def __init__(self, variant: GemmaVariant) -> None:
        super().__init__()
        self.head_dim = variant.head_dim
        queries = variant.num_heads * variant.head_dim
        keys = variant.num_kv_heads * variant.head_dim
        self.query = _projection("attention.query", variant, variant.width, queries)
        self.key = _projection("attention.key", variant, variant.width, keys)
        self.value = _projection("attention.value", variant, variant.width, keys)
        self.out = _projection("attention.out", variant, queries, variant.width)

    def project(self, x: Float[Tensor, "B S D"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, S, K, head_dim], keys and values [B, S, G, head_dim]."""
        return (
            self._heads(self.query(x)),
            self._heads(self.key(x)),
            self._heads(self.value(x)),
        )

    def _heads(self, y: Float[Tensor, "B S KH"]) -> Float[Tensor, "B S K H"]:
        return y.reshape(*y.shape[:-1], -1, self.head_dim)


class Mlp(nn.Module):
    """The gated MLP: down(gelu(gate(x)) * up(x))."""

    def __init__(self, variant: GemmaVariant) -> None:
        super().__init__()
        self.gate = _projection("mlp.gate", variant, variant.width, variant.mlp_dim)
        self.up = _projection("mlp.up", variant, variant.width, variant.mlp_dim)
        self.down = _projection("mlp.down", variant, variant.mlp_dim, variant.width)

    def forward(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        return self.down(gelu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """One expert's part of a layer."""

    def __init__(self, variant: GemmaVariant, *, adaptive: bool) -> None:
        super().__init__()
        norm = AdaptiveRMSNorm if adaptive else RMSNorm
        self.attention_norm = norm(variant.width)
        self.attention = Attention(variant)
        self.mlp_norm = norm(variant.width)
        self.mlp = Mlp(variant)


class Expert(nn.Module):
    """One expert: its layers and its final norm."""

    def __init__(self, variant: GemmaVariant, *, adaptive: bool) -> None:
        super().__init__()
        self.layers = stack(lambda: Layer(variant, adaptive=adaptive), variant.depth)
        norm = AdaptiveRMSNorm if adaptive else RMSNorm
        self.final_norm = norm(variant.width)


class Embedder(nn.Module):
    """The table of token embeddings."""

    def __init__(self, variant: GemmaVariant) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(variant.vocab_size, variant.width))

    def forward(self, tokens: Int[Tensor, "B L"], dtype: torch.dtype) -> Float[Tensor, "B L D"]:
        """Rows of the table times the root of its width."""
        rows = nn.functional.embedding(tokens, self.embedding).to(dtype)
        root = torch.full((), rows.shape[-1] ** 0.5, dtype=dtype, device=rows.device)
        return rows * root


class Gemma(nn.Module):
    """The two experts and the embedding table."""

    def __init__(self, config: Pi0Config) -> None:
        super().__init__()
        self.head_dim = config.paligemma.head_dim
        self.embedder = Embedder(config.paligemma)
        self.language = Expert(config.paligemma, adaptive=False)
        self.action = Expert(config.action_expert, adaptive=config.pi05)

    def forward(
        self,
        prefix: Float[Tensor, "B S D"],
        suffix: Float[Tensor, "B H E"],
        condition: Float[Tensor, "B E"] | None,
        mask: Bool[Tensor, "B S+H S+H"],
        positions: Int[Tensor, "B S+H"],
        gradient_checkpointing: GradientCheckpointing = "none",
        compiled: bool = False,
    ) -> tuple[Float[Tensor, "B S D"], Float[Tensor, "B H E"]]:
        """Both experts over the whole sequence, as in training."""
        angles = rotary(positions, self.head_dim, prefix.dtype)
        layer = layer_function(joint_layer, gradient_checkpointing, compiled)
        x = (prefix, suffix)
        for layers in zip(self.language.layers, self.action.layers, strict=True):
            x, _ = layer(layers, x, condition, mask, angles)
        return (
            self.language.final_norm(x[0], None)[0],
            self.action.final_norm(x[1], condition)[0],
        )

    def prefill(
        self,
        prefix: Float[Tensor, "B S D"],
        mask: Bool[Tensor, "B S S"],
        positions: Int[Tensor, "B S"],
    ) -> tuple[Float[Tensor, "B S D"], KVCache]:
        """The language model over the prefix, and the keys and values that the suffix needs."""
        angles = rotary(positions, self.head_dim, prefix.dtype)
        x, keys_values = (prefix,), []
        for layer in self.language.layers:
            x, key_value = joint_layer((layer,), x, None, mask, angles)
            keys_values.append(key_value)
        keys, values = (torch.stack(parts) for parts in zip(*keys_values, strict=True))
        return self.language.final_norm(x[0], None)[0], KVCache(keys, values)

    def decode(
        self,
        suffix: Float[Tensor, "B H E"],
        condition: Float[Tensor, "B E"] | None,
        mask: Bool[Tensor, "B H S+H"],
        positions: Int[Tensor, "B H"],
        cache: KVCache,
    ) -> Float[Tensor, "B H E"]:
        """The action expert over the suffix, attending to [cached prefix ; suffix]."""
        angles = rotary(positions, self.head_dim, suffix.dtype)
        x = (suffix,)
        for layer, *past in zip(self.action.layers, cache.key, cache.value, strict=True):
            x, _ = joint_layer((layer,), x, condition, mask, angles, past)
        return self.action.final_norm(x[0], condition)[0]


def joint_layer(
    layers: Sequence[Layer],
    x: Sequence[Float[Tensor, "B _ _"]],
    condition: Float[Tensor, "B E"] | None,
    mask: Bool[Tensor, "B S T"],
    rotary: Rotary,
    past: Sequence[Float[Tensor, "B P G head_dim"]] | None = None,
) -> tuple[tuple[Float[Tensor, "B _ _"], ...], tuple[Tensor, Tensor]]:
    """One layer of the experts that take part, each over its own tokens.

    Args:
        layers: a layer an expert, in the order of the tokens.
        x: the tokens of each.
        condition: of the adaptive norms; ignored by experts without.
        mask: who of the S tokens here may attend to whom of the T = P + S.
        rotary: of the S tokens here.
        past: keys and values of P tokens before these, if there are any.

    Returns:
        The tokens after the layer, and the keys and values of the S tokens.
    """
    normed, gates = zip(
        *(layer.attention_norm(y, condition) for layer, y in zip(layers, x, strict=True)),
        strict=True,
    )
    projected = [layer.attention.project(y) for layer, y in zip(layers, normed, strict=True)]
    q, k, v = (torch.cat(parts, dim=1) for parts in zip(*projected, strict=True))
    q = rotate(q, rotary) * q.shape[-1] ** -0.5
    k = rotate(k, rotary)
    keys, values = (k, v) if past is None else _append(past, (k, v))
    attended = attend(q, keys, values, mask).split([y.shape[1] for y in x], dim=1)

    outputs = []
    for layer, y, part, gate in zip(layers, x, attended, gates, strict=True):
        y = _residual(y, layer.attention.out(part), gate)
        normed_y, mlp_gate = layer.mlp_norm(y, condition)
        outputs.append(_residual(y, layer.mlp(normed_y), mlp_gate))
    return tuple(outputs), (k, v)


def _append(past: Sequence[Tensor], new: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Keys and values [B, P + S, G, head_dim] of the cached tokens, then of the new ones."""
    return tuple(torch.cat(both, dim=1) for both in zip(past, new, strict=True))


def _residual(
    x: Float[Tensor, "B S D"], y: Float[Tensor, "B S D"], gate: Float[Tensor, "B 1 D"] | None
) -> Float[Tensor, "B S D"]:
    return x + y if gate is None else x + y * gate
