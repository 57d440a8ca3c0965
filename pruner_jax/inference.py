"""The fast way from an observation to actions, over `Deployed` weights.

What `sampling` computes, but for rounding. No layer is asked for what nobody reads (the last one of
the prefix gives keys and values alone), and what every call would compute again is looked up.

A call is two compiled functions of static shapes, `encode` and `act`, and, with the implicit
selection, one read of an integer between them.

Dimension letters: B batch, C cameras, N patches, L prompt tokens, S prefix, H suffix, T = S + H,
D width, E width of the suffix, K heads, G kv heads, A action dim.
"""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pruner_jax import sampling
from pruner_jax.deployed import (
    Affine,
    Deployed,
    ExpertLayer,
    Modulation,
    Norm,
    Schedule,
    Vision,
    VisionBlock,
    clock_of,
    deploy,
    schedule,
)
from pruner_jax.gemma import Rotary, rotary, rotate
from pruner_jax.layers import LAYER_NORM_EPSILON, attend, gelu, wide
from pruner_jax.pruner import Selection, rms_normalize
from pruner_jax.siglip import patchify
from pruner_spec.config import VisionVariant
from pruner_spec.inference import InferenceSettings
from pruner_spec.observation import EncodingPlan, Observation

if TYPE_CHECKING:
    from pruner_jax.pi0 import Encoded, Pi0, Prefix


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys (after RoPE) and values of the prefix; PyTorch's with room for the suffix's.

    Attributes:
        key, value: one a layer; [B, S, G, head_dim] in JAX, which writes nowhere, and
            [B, T, G, head_dim] in PyTorch.
        valid: bool [B, S].
        suffix: RoPE of the H tokens of the suffix.
    """

    key: tuple[Float[Array, "B _ G head_dim"], ...]
    value: tuple[Float[Array, "B _ G head_dim"], ...]
    valid: Bool[Array, "B S"]
    suffix: Rotary


class Sampler:
    """A deployed model: its `sample_actions` is the model's, and so are the statistics it leaves.

    What it packs are copies: a model that is trained further is deployed anew.

    Args:
        model: whose weights these are.
        settings: None for the defaults.
    """

    def __init__(self, model: "Pi0", settings: InferenceSettings | None = None) -> None:
        graph, state = nnx.split(model)
        # Without parameters, so that those of the model may go; the record is the model's.
        self.model = nnx.merge(graph, jax.eval_shape(lambda: state))
        self.settings = InferenceSettings() if settings is None else settings
        self._weights, self._clock = deploy(model), clock_of(model)
        self._schedules: dict[int, Schedule] = {}
        self._encode = jax.jit(functools.partial(_encode, self.model), static_argnums=2)
        self._act = jax.jit(functools.partial(act, self.model), static_argnums=6)
        self._embed = jax.jit(functools.partial(_embed, self.model), static_argnums=2)
        self._select = jax.jit(self.model.select)
        self._prune = jax.jit(functools.partial(sampling.prune, self.model), static_argnums=2)
        self._prefill = jax.jit(functools.partial(prefill, self.model))
        self._denoise = jax.jit(functools.partial(denoise, self.model))

    def sample_actions(
        self,
        observation: Observation,
        noise: Float[Array, "B H A"],
        num_steps: int = 10,
    ) -> Float[Array, "B H A"]:
        """Actions, denoised from the noise. See `sampling.sample_actions`."""
        return sampling.sample_actions(self.model, observation, noise, num_steps, stages=self)

    def warm_up(
        self,
        observation: Observation,
        noise: Float[Array, "B H A"],
        num_steps: int = 10,
    ) -> None:
        """Computes actions once for every number of patches that may be kept.

        Args:
            observation, noise: of the sizes to come.
            num_steps: Euler steps.
        """
        plan = sampling.plan_of(observation)
        there = self.model.prepare(observation)
        encoded, selection = self.encode(there, plan)
        for room in sampling.capacities(self.model, len(plan.cameras)):
            self.act(encoded, selection, there.state, noise, room, num_steps)

    def distance(
        self,
        model: "Pi0",
        observation: Observation,
        noise: Float[Array, "B H A"],
        num_steps: int = 10,
    ) -> float:
        """How far this way is from the plain one: in the patches, or in actions from the same ones.

        Args:
            model: that this is a sampler of.
            observation, noise: of a call that has been made before.
            num_steps: Euler steps.

        Returns:
            The larger of the two relative distances; infinite where a number is not finite.
        """
        plain, plan = sampling.PlainStages(model), sampling.plan_of(observation)
        there = model.prepare(observation)
        encoded, selection = plain.encode(there, plan)
        patches = _distance(self.embed(there, plan).patches, encoded.patches)
        room = sampling.capacity(model, encoded, selection)
        inputs = (encoded, selection, there.state, noise, room, num_steps)
        return max(patches, _distance(self.act(*inputs), plain.act(*inputs)))

    def encode(self, observation: Observation, plan: EncodingPlan) -> "tuple[Encoded, Selection]":
        """See `sampling.Stages`."""
        return self._encode(self._weights, observation, plan)

    def act(
        self,
        encoded: "Encoded",
        selection: Selection,
        state: Float[Array, "B A"],
        noise: Float[Array, "B H A"],
        capacity: int | None,
        num_steps: int,
    ) -> Float[Array, "B H A"]:
        """See `sampling.Stages`."""
        steps = self._schedule(num_steps)
        return self._act(self._weights, steps, encoded, selection, state, noise, capacity)

    def embed(self, observation: Observation, plan: EncodingPlan) -> "Encoded":
        """See `sampling.Stages`."""
        return self._embed(self._weights, observation, plan)

    def select(self, encoded: "Encoded") -> Selection:
        """See `sampling.Stages`."""
        return self._select(encoded)

    def prune(self, encoded: "Encoded", selection: Selection, capacity: int | None) -> "Prefix":
        """See `sampling.Stages`."""
        return self._prune(encoded, selection, capacity)

    def prefill(self, prefix: "Prefix") -> Cache:
        """See `sampling.Stages`."""
        return self._prefill(self._weights, prefix)

    def denoise(
        self,
        prefix: "Prefix",
        cache: Cache,
        state: Float[Array, "B A"],
        noise: Float[Array, "B H A"],
        num_steps: int,
    ) -> Float[Array, "B H A"]:
        """See `sampling.Stages`."""
        return self._denoise(self._weights, self._schedule(num_steps), cache, state, noise)

    def _schedule(self, num_steps: int) -> Schedule:
        if num_steps not in self._schedules:
            self._schedules[num_steps] = schedule(self._clock, num_steps, self.model.dtype)
        return self._schedules[num_steps]


def inputs_of(observation: Observation, plan: EncodingPlan) -> tuple[Array, ...]:
    """What `encode` reads of an observation: images, camera mask, prompt, prompt mask."""
    return (
        jnp.stack([observation.images[camera] for camera in plan.cameras], axis=1),
        jnp.stack([observation.image_masks[camera] for camera in plan.cameras], axis=1),
        observation.tokenized_prompt[:, : plan.prompt_length],
        observation.tokenized_prompt_mask[:, : plan.prompt_length],
    )


def encode(
    model: "Pi0",
    weights: Deployed,
    images: Float[Array, "B C 224 224 3"],
    camera_mask: Bool[Array, "B C"],
    prompt: Int[Array, "B L"],
    prompt_mask: Bool[Array, "B L"],
) -> "tuple[Encoded, Selection]":
    """Tokens, and which of them are kept.

    Args:
        model: of which no parameter is read.
        weights: its parameters.
        images, camera_mask, prompt, prompt_mask: see `Pi0.embed`.
    """
    encoded = embed(model, weights, images, camera_mask, prompt, prompt_mask)
    return encoded, model.select(encoded)


def embed(
    model: "Pi0",
    weights: Deployed,
    images: Float[Array, "B C 224 224 3"],
    camera_mask: Bool[Array, "B C"],
    prompt: Int[Array, "B L"],
    prompt_mask: Bool[Array, "B L"],
) -> "Encoded":
    """`Pi0.embed`, over deployed weights."""
    from pruner_jax.pi0 import Encoded  # here, since pi0 imports this module

    variant, dtype = model.config.vision, model.dtype
    together = images.reshape(-1, *images.shape[2:])
    patches = see(weights.vision, together, variant, dtype)
    rows = weights.embedding[prompt].astype(dtype)
    return Encoded(
        patches=patches.reshape(*images.shape[:2], *patches.shape[1:]),
        camera_mask=camera_mask,
        prompt=rows * jnp.asarray(np.sqrt(rows.shape[-1]), dtype=dtype),
        prompt_mask=prompt_mask,
    )


def act(
    model: "Pi0",
    weights: Deployed,
    schedule: Schedule,
    encoded: "Encoded",
    selection: Selection,
    state: Float[Array, "B A"],
    noise: Float[Array, "B H A"],
    capacity: int | None,
) -> Float[Array, "B H A"]:
    """Actions, from the tokens and the selection of `encode`.

    Args:
        model: of which no parameter is read.
        weights: its parameters.
        schedule: its denoising steps.
        encoded, selection: see `encode`.
        state: of the robot; π0.5 reads it in the prompt.
        noise: standard normal.
        capacity: patches after pruning; None where nothing is pruned.
    """
    prefix = sampling.prune(model, encoded, selection, capacity)
    return denoise(model, weights, schedule, prefill(model, weights, prefix), state, noise)


def see(
    weights: Vision,
    images: Float[Array, "B height width 3"],
    variant: VisionVariant,
    dtype: jnp.dtype,
) -> Float[Array, "B N D"]:
    """The vision tower: `SigLip.__call__`."""
    pixels = patchify(images.astype(wide(dtype)), variant.patch_size)
    x = _affine(pixels, weights.patch_embedding).astype(dtype)
    for block in weights.blocks:
        x = _vision_block(block, x, variant.num_heads)
    return _affine(_layer_norm(x, weights.final_norm), weights.head)


def prefill(model: "Pi0", weights: Deployed, prefix: "Prefix") -> Cache:
    """Keys and values of the prefix."""
    config, head_dim = model.config, model.config.paligemma.head_dim
    groups = config.paligemma.num_kv_heads
    angles = rotary(prefix.positions, head_dim, model.dtype)
    # Nobody reads what padding attends to, so that a mask of keys is enough.
    mask = prefix.valid[:, None]
    x, written = prefix.tokens, []
    for layer in weights.language[:-1]:
        x, key_value = _prefix_layer(layer, x, angles, mask, groups)
        written.append(key_value)
    written.append(_project_keys(weights.language[-1], x, angles, groups))
    key, value = zip(*written, strict=True)
    place = jnp.arange(config.suffix_length)
    suffix = rotary(prefix.length[:, None] + place, head_dim, model.dtype)
    return Cache(key, value, prefix.valid, suffix)


def denoise(
    model: "Pi0",
    weights: Deployed,
    schedule: Schedule,
    cache: Cache,
    state: Float[Array, "B A"],
    noise: Float[Array, "B H A"],
) -> Float[Array, "B H A"]:
    """Euler steps from the noise at time 1 to the actions at time 0."""
    mask = _suffix_mask(model, cache.valid)
    first = None if weights.state_in is None else _affine(state, weights.state_in)[:, None]

    def advance(x: Float[Array, "B H A"], now: _Now) -> tuple[Array, None]:
        y = _suffix_tokens(weights, now, x, first).astype(model.dtype)
        for place, layer in enumerate(weights.action):
            norms, past = _norms(layer, now, place), (cache.key[place], cache.value[place])
            y = _suffix_layer(layer, norms, y, cache.suffix, mask, past)
        y = _rms_norm(y, _final_norm(weights, now))
        output = y[:, -model.config.action_horizon :].astype(wide(model.dtype))
        return x + schedule.step * _affine(output, weights.action_out), None

    now = _Now(schedule.attention, schedule.mlp, schedule.final, schedule.time)
    x, _ = jax.lax.scan(advance, noise, now, length=schedule.steps)
    return x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Now:
    """A schedule's tables; within a step, that step's rows."""

    attention: Modulation | None
    mlp: Modulation | None
    final: Modulation | None
    time: Float[Array, "E"] | None


@dataclasses.dataclass(frozen=True)
class _Norms:
    """Of one layer at one step; a gate is None where the residual is added as it is."""

    attention: Norm
    attention_gate: Float[Array, "E"] | None
    mlp: Norm
    mlp_gate: Float[Array, "E"] | None


def _norms(layer: ExpertLayer, now: _Now, place: int) -> _Norms:
    """A layer's own, or the schedule's."""
    if layer.attention_norm is not None and layer.mlp_norm is not None:
        return _Norms(layer.attention_norm, None, layer.mlp_norm, None)
    assert now.attention is not None
    assert now.mlp is not None
    return _Norms(
        Norm(now.attention.scale[place], now.attention.shift[place]),
        now.attention.gate[place],
        Norm(now.mlp.scale[place], now.mlp.shift[place]),
        now.mlp.gate[place],
    )


def _final_norm(weights: Deployed, now: _Now) -> Norm:
    if now.final is not None:
        return Norm(now.final.scale, now.final.shift)
    assert weights.final_norm is not None
    return weights.final_norm


def _suffix_tokens(
    weights: Deployed,
    now: _Now,
    x: Float[Array, "B H A"],
    first: Float[Array, "B 1 E"] | None,
) -> Float[Array, "B H E"]:
    """`Pi0.embed_suffix_at`; `first` is π0's state token."""
    tokens = _affine(x, weights.action_in)
    if now.time is None or weights.time_in is None or weights.time_out is None:
        return tokens
    assert first is not None
    tokens = jax.nn.silu(_affine(tokens, weights.time_in) + now.time)
    return jnp.concatenate([first, _affine(tokens, weights.time_out)], axis=1)


def _prefix_layer(
    layer: ExpertLayer,
    x: Float[Array, "B S D"],
    angles: Rotary,
    mask: Bool[Array, "B 1 S"],
    groups: int,
) -> tuple[Float[Array, "B S D"], tuple[Array, Array]]:
    """A layer of the language model, and its keys and values."""
    assert layer.attention_norm is not None
    assert layer.mlp_norm is not None
    head_dim = 2 * angles.cos.shape[-1]
    normed = _rms_norm(x, layer.attention_norm)
    query, key, value = _project(layer, normed, angles, groups, head_dim)
    x = x + _attend(query, key, value, mask) @ layer.out
    x = x + _gated(_rms_norm(x, layer.mlp_norm), layer) @ layer.down
    return x, (key, value)


def _suffix_layer(
    layer: ExpertLayer,
    norms: _Norms,
    x: Float[Array, "B H E"],
    angles: Rotary,
    mask: Bool[Array, "B _ T"],
    past: tuple[Float[Array, "B S G head_dim"], Float[Array, "B S G head_dim"]],
) -> Float[Array, "B H E"]:
    """A layer of the action expert, attending to [cached prefix ; suffix]."""
    groups, head_dim = past[0].shape[2:]
    normed = _rms_norm(x, norms.attention)
    query, *new = _project(layer, normed, angles, groups, head_dim)
    key, value = (jnp.concatenate(both, axis=1) for both in zip(past, new, strict=True))
    attended = _attend(query, key, value, mask) @ layer.out
    x = _add(x, attended, norms.attention_gate)
    gated = _gated(_rms_norm(x, norms.mlp), layer) @ layer.down
    return _add(x, gated, norms.mlp_gate)


def _vision_block(
    block: VisionBlock, x: Float[Array, "B N D"], num_heads: int
) -> Float[Array, "B N D"]:
    qkv = _affine(_layer_norm(x, block.attention_norm), block.qkv)
    q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, num_heads, -1), 2, 0)
    x = x + _affine(attend(q * q.shape[-1] ** -0.5, k, v), block.out)
    return x + _affine(gelu(_affine(_layer_norm(x, block.mlp_norm), block.up)), block.down)


def _suffix_mask(model: "Pi0", valid: Bool[Array, "B S"]) -> Bool[Array, "B _ T"]:
    """Who of the suffix may attend to whom; one row where all see the same."""
    batch, length = valid.shape
    size = model.config.suffix_length
    before = jnp.concatenate([valid, jnp.ones((batch, size), bool)], axis=1)[:, None]
    if model.config.pi05:
        return before
    place = jnp.arange(length + size)
    return before & (place <= jnp.where(place[length:, None] == length, length, length + size))


def _affine(x: Float[Array, "*batch inputs"], affine: Affine) -> Float[Array, "*batch outputs"]:
    y = x @ affine.kernel
    return y if affine.bias is None else y + affine.bias


def _layer_norm(x: Float[Array, "B N D"], norm: Norm) -> Float[Array, "B N D"]:
    high = x.astype(wide(x.dtype))
    centred = high - high.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON) * norm.scale
    return (normed if norm.shift is None else normed + norm.shift).astype(x.dtype)


def _rms_norm(x: Float[Array, "B S D"], norm: Norm) -> Float[Array, "B S D"]:
    normed = rms_normalize(x) * norm.scale
    return (normed if norm.shift is None else normed + norm.shift).astype(x.dtype)


def _project(
    layer: ExpertLayer, x: Float[Array, "B S D"], angles: Rotary, groups: int, head_dim: int
) -> tuple[Array, Array, Array]:
    """Queries [B, S, K, head_dim], keys and values [B, S, G, head_dim]."""
    heads = (x @ layer.qkv).reshape(*x.shape[:2], -1, head_dim)
    ends = heads.shape[2] - 2 * groups, heads.shape[2] - groups
    query, key, value = jnp.split(heads, ends, axis=2)
    return rotate(query, angles), rotate(key, angles), value


def _project_keys(
    layer: ExpertLayer, x: Float[Array, "B S D"], angles: Rotary, groups: int
) -> tuple[Float[Array, "B S G head_dim"], Float[Array, "B S G head_dim"]]:
    """Of the last layer of the prefix nobody reads more than keys and values."""
    assert layer.attention_norm is not None
    outputs = 2 * groups * 2 * angles.cos.shape[-1]
    normed = _rms_norm(x, layer.attention_norm) @ layer.qkv[:, -outputs:]
    key, value = jnp.split(normed.reshape(*x.shape[:2], 2 * groups, -1), 2, axis=2)
    return rotate(key, angles), value


def _attend(
    query: Float[Array, "B S K head_dim"],
    key: Float[Array, "B T G head_dim"],
    value: Float[Array, "B T G head_dim"],
    mask: Bool[Array, "B _ T"],
) -> Float[Array, "B S K*head_dim"]:
    """Softmax attention of queries that are scaled already."""
    everyone = jnp.broadcast_to(mask, (len(mask), query.shape[1], key.shape[1]))
    return attend(query, key, value, everyone)


def _gated(x: Float[Array, "B S D"], layer: ExpertLayer) -> Float[Array, "B S F"]:
    gate, up = jnp.split(x @ layer.gate_up, 2, axis=-1)
    return gelu(gate) * up


def _add(
    x: Float[Array, "B S D"], y: Float[Array, "B S D"], gate: Float[Array, "D"] | None
) -> Float[Array, "B S D"]:
    return x + y if gate is None else x + y * gate


def _encode(
    model: "Pi0", weights: Deployed, observation: Observation, plan: EncodingPlan
) -> "tuple[Encoded, Any]":
    return encode(model, weights, *inputs_of(observation, plan))


def _embed(
    model: "Pi0", weights: Deployed, observation: Observation, plan: EncodingPlan
) -> "Encoded":
    return embed(model, weights, *inputs_of(observation, plan))


def _distance(found: Float[Array, "*shape"], expected: Float[Array, "*shape"]) -> float:
    """Norm of the difference, over the norm of what is expected; infinite for NaN."""
    wide_found, wide_expected = (np.asarray(x).astype(np.float64) for x in (found, expected))
    apart = np.linalg.norm(wide_found - wide_expected) / np.linalg.norm(wide_expected)
    return float(apart) if math.isfinite(apart) else math.inf
