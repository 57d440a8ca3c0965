"""Gemma with two experts that attend jointly: the language model and the action expert.

The prefix (image and prompt tokens) runs through the language model, the suffix (action tokens)
through the action expert. A layer concatenates the queries, keys and values of both along the
sequence, attends, and splits again; every other weight is the expert's own.

Dimension letters: B batch, S prefix, H suffix, D width, K heads, G kv heads, L layers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pruner_jax.layers import Linear, attend, constant, gelu, stack, wide
from pruner_jax.lora import Adapter
from pruner_jax.recomputation import layer_function
from pruner_spec.config import GemmaVariant, Pi0Config
from pruner_spec.sequence import rope_timescales
from pruner_spec.training import GradientCheckpointing

RMS_EPSILON = 1e-6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (after RoPE) and values of the prefix, all layers: [L, B, S, G, head_dim]."""

    key: Float[Array, "L B S G head_dim"]
    value: Float[Array, "L B S G head_dim"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotary:
    """Cosines and sines of RoPE's angles, [B, S, 1, head_dim / 2], the same for all layers."""

    cos: Float[Array, "B S 1 half"]
    sin: Float[Array, "B S 1 half"]


def rotary(positions: Int[Array, "B S"], head_dim: int, dtype: jnp.dtype) -> Rotary:
    """The angles of the positions, in `wide` precision."""
    timescales = constant(rope_timescales, (head_dim,), wide(dtype))
    # Dividing by a broadcast array, XLA would multiply by its reciprocal instead, and move angles
    # of up to 1000 radians by several 1e-5; it does not look through the barrier.
    shape = (*positions.shape, 1, *timescales.shape)
    divisors = jax.lax.optimization_barrier(jnp.broadcast_to(timescales, shape))
    angles = positions[..., None, None] / divisors
    return Rotary(cos=jnp.cos(angles), sin=jnp.sin(angles))


def rotate(x: Float[Array, "B S K H"], rotary: Rotary) -> Float[Array, "B S K H"]:
    """RoPE over the two halves of the head dimension, not interleaved."""
    first, second = jnp.split(x.astype(rotary.cos.dtype), 2, axis=-1)
    turned = (
        first * rotary.cos - second * rotary.sin,
        second * rotary.cos + first * rotary.sin,
    )
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x over its root mean square, times one plus the scale; no gate."""

    def __init__(self, width: int) -> None:
        self.scale = nnx.Param(jnp.zeros(width, jnp.float32))

    def __call__(
        self, x: Float[Array, "B S D"], condition: Float[Array, "B D"] | None
    ) -> tuple[Float[Array, "B S D"], None]:
        normed = _rms_normalize(x)
        return (normed * (1 + self.scale[...].astype(normed.dtype))).astype(x.dtype), None


class AdaptiveRMSNorm(nnx.Module):
    """An RMS norm whose scale and shift, and the gate of the residual, depend on a condition."""

    def __init__(self, width: int) -> None:
        self.modulation = Linear(width, 3 * width)

    def __call__(
        self, x: Float[Array, "B S D"], condition: Float[Array, "B D"] | None
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B 1 D"]]:
        assert condition is not None
        scale, shift, gate = jnp.split(self.modulation(condition)[:, None], 3, axis=-1)
        normed = _rms_normalize(x)
        return (normed * (1 + scale) + shift).astype(x.dtype), gate.astype(x.dtype)


def _rms_normalize(x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    x = x.astype(wide(x.dtype))
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + RMS_EPSILON)


def _projection(name: str, variant: GemmaVariant, inputs: int, outputs: int) -> Linear:
    """One of an expert's kernels, without a bias, and its adapter if the expert has any."""
    lora = None if variant.lora is None else Adapter(name, variant)
    return Linear(inputs, outputs, use_bias=False, lora=lora)


class Attention(nnx.Module):
    """One expert's projections of the joint attention."""

    def __init__(self, variant: GemmaVariant) -> None:
        self.head_dim = variant.head_dim
        queries = variant.num_heads * variant.head_dim
        keys = variant.num_kv_heads * variant.head_dim
        self.query = _projection("attention.query", variant, variant.width, queries)
        self.key = _projection("attention.key", variant, variant.width, keys)
        self.value = _projection("attention.value", variant, variant.width, keys)
        self.out = _projection("attention.out", variant, queries, variant.width)

    def project(self, x: Float[Array, "B S D"]) -> tuple[Array, Array, Array]:
        """Queries [B, S, K, head_dim], keys and values [B, S, G, head_dim]."""
        return (
            self._heads(self.query(x)),
            self._heads(self.key(x)),
            self._heads(self.value(x)),
        )

    def _heads(self, y: Float[Array, "B S KH"]) -> Float[Array, "B S K H"]:
        return y.reshape(*y.shape[:-1], -1, self.head_dim)


class Mlp(nnx.Module):
    """The gated MLP: down(gelu(gate(x)) * up(x))."""

    def __init__(self, variant: GemmaVariant) -> None:
        self.gate = _projection("mlp.gate", variant, variant.width, variant.mlp_dim)
        self.up = _projection("mlp.up", variant, variant.width, variant.mlp_dim)
        self.down = _projection("mlp.down", variant, variant.mlp_dim, variant.width)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return self.down(gelu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """One expert's part of a layer."""

    def __init__(self, variant: GemmaVariant, *, adaptive: bool) -> None:
        norm = AdaptiveRMSNorm if adaptive else RMSNorm
        self.attention_norm = norm(variant.width)
        self.attention = Attention(variant)
        self.mlp_norm = norm(variant.width)
        self.mlp = Mlp(variant)


class Expert(nnx.Module):
    """One expert: its layers and its final norm."""

    def __init__(self, variant: GemmaVariant, *, adaptive: bool) -> None:
        self.layers = stack(lambda: Layer(variant, adaptive=adaptive), variant.depth)
        norm = AdaptiveRMSNorm if adaptive else RMSNorm
        self.final_norm = norm(variant.width)


class Embedder(nnx.Module):
    """The table of token embeddings."""

    def __init__(self, variant: GemmaVariant) -> None:
        self.embedding = nnx.Param(jnp.zeros((variant.vocab_size, variant.width), jnp.float32))

    def __call__(self, tokens: Int[Array, "B L"], dtype: jnp.dtype) -> Float[Array, "B L D"]:
        """Rows of the table times the root of its width."""
        rows = self.embedding[...][tokens].astype(dtype)
        root = jnp.asarray(np.sqrt(rows.shape[-1]), dtype=dtype)
        return rows * root


class Gemma(nnx.Module):
    """The two experts and the embedding table."""

    def __init__(self, config: Pi0Config) -> None:
        self.head_dim = config.paligemma.head_dim
        self.embedder = Embedder(config.paligemma)
        self.language = Expert(config.paligemma, adaptive=False)
        self.action = Expert(config.action_expert, adaptive=config.pi05)

    def __call__(
        self,
        prefix: Float[Array, "B S D"],
        suffix: Float[Array, "B H E"],
        condition: Float[Array, "B E"] | None,
        mask: Bool[Array, "B S+H S+H"],
        positions: Int[Array, "B S+H"],
        gradient_checkpointing: GradientCheckpointing = "none",
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B H E"]]:
        """Both experts over the whole sequence, as in training."""
        angles = rotary(positions, self.head_dim, prefix.dtype)
        experts = (self.language.layers, self.action.layers)

        def layer(x: tuple[Array, ...], stacked: Any) -> tuple[tuple[Array, ...], None]:
            x, _ = joint_layer(_merge(graphs, stacked), x, condition, mask, angles)
            return x, None

        graphs, stacked = _split(experts)
        scanned = layer_function(layer, gradient_checkpointing)
        x, _ = jax.lax.scan(scanned, (prefix, suffix), stacked)
        return (
            self.language.final_norm(x[0], None)[0],
            self.action.final_norm(x[1], condition)[0],
        )

    def prefill(
        self,
        prefix: Float[Array, "B S D"],
        mask: Bool[Array, "B S S"],
        positions: Int[Array, "B S"],
    ) -> tuple[Float[Array, "B S D"], KVCache]:
        """The language model over the prefix, and the keys and values that the suffix needs."""
        angles = rotary(positions, self.head_dim, prefix.dtype)

        def layer(x: tuple[Array, ...], stacked: Any) -> tuple[tuple[Array, ...], tuple]:
            return joint_layer(_merge(graphs, stacked), x, None, mask, angles)

        graphs, stacked = _split((self.language.layers,))
        x, (keys, values) = jax.lax.scan(layer, (prefix,), stacked)
        return self.language.final_norm(x[0], None)[0], KVCache(keys, values)

    def decode(
        self,
        suffix: Float[Array, "B H E"],
        condition: Float[Array, "B E"] | None,
        mask: Bool[Array, "B H S+H"],
        positions: Int[Array, "B H"],
        cache: KVCache,
    ) -> Float[Array, "B H E"]:
        """The action expert over the suffix, attending to [cached prefix ; suffix]."""
        angles = rotary(positions, self.head_dim, suffix.dtype)

        def layer(x: tuple[Array, ...], scanned: Any) -> tuple[tuple[Array, ...], None]:
            stacked, past = scanned
            x, _ = joint_layer(_merge(graphs, stacked), x, condition, mask, angles, past)
            return x, None

        graphs, stacked = _split((self.action.layers,))
        x, _ = jax.lax.scan(layer, (suffix,), (stacked, (cache.key, cache.value)))
        return self.action.final_norm(x[0], condition)[0]


def joint_layer(
    layers: Sequence[Layer],
    x: Sequence[Float[Array, "B _ _"]],
    condition: Float[Array, "B E"] | None,
    mask: Bool[Array, "B S T"],
    rotary: Rotary,
    past: Sequence[Float[Array, "B P G head_dim"]] | None = None,
) -> tuple[tuple[Float[Array, "B _ _"], ...], tuple[Array, Array]]:
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
    q, k, v = (jnp.concatenate(parts, axis=1) for parts in zip(*projected, strict=True))
    q = rotate(q, rotary) * q.shape[-1] ** -0.5
    k = rotate(k, rotary)
    keys, values = (k, v) if past is None else _append(past, (k, v))
    ends = np.cumsum([y.shape[1] for y in x])[:-1]
    attended = jnp.split(attend(q, keys, values, mask), ends, axis=1)

    outputs = []
    for layer, y, part, gate in zip(layers, x, attended, gates, strict=True):
        y = _residual(y, layer.attention.out(part), gate)
        normed_y, mlp_gate = layer.mlp_norm(y, condition)
        outputs.append(_residual(y, layer.mlp(normed_y), mlp_gate))
    return tuple(outputs), (k, v)


def _append(past: Sequence[Array], new: Sequence[Array]) -> tuple[Array, ...]:
    """Keys and values [B, P + S, G, head_dim] of the cached tokens, then of the new ones."""
    return tuple(jnp.concatenate(both, axis=1) for both in zip(past, new, strict=True))


def _residual(
    x: Float[Array, "B S D"], y: Float[Array, "B S D"], gate: Float[Array, "B 1 D"] | None
) -> Float[Array, "B S D"]:
    return x + y if gate is None else x + y * gate


def _split(modules: Sequence[nnx.Module]) -> tuple[list, list]:
    """Graphs and states of modules with stacked parameters, for a scan over their layers."""
    graphs, states = zip(*map(nnx.split, modules), strict=True)
    return list(graphs), list(states)


def _merge(graphs: Sequence[Any], states: Sequence[Any]) -> list[Any]:
    return [nnx.merge(graph, state) for graph, state in zip(graphs, states, strict=True)]
