"""What the fast way computes, over `Deployed` weights: from an observation to actions.

What `sampling` computes, but for rounding. No layer is asked for what nobody reads (the last one of
the prefix gives keys and values alone), keys and values are written where the denoising steps read
them, and what every call would compute again is looked up. Small products and attention go through
`operations`: `kernels`, Triton's on a GPU, or `kernels_plain`.

Dimension letters: B batch, C cameras, N patches, L prompt tokens, S prefix, H suffix, T = S + H,
D width, E width of the suffix, K heads, G kv heads, A action dim.
"""

import dataclasses
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pruner_torch import kernels_plain, sampling
from pruner_torch.deployed import Deployed, ExpertLayer, Norm, Schedule
from pruner_torch.forward_vision import apply_affine, see
from pruner_torch.gemma import Rotary, rotary
from pruner_torch.layers import attend
from pruner_torch.pruner import Selection
from pruner_torch.recomputation import optimized

if TYPE_CHECKING:
    from pruner_torch.pi0 import Encoded, Pi0, Prefix


@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys (after RoPE) and values of the prefix.

    Attributes:
        key, value: one a layer, with room for those of the suffix.
        valid: bool [B, S].
        suffix: RoPE of the H tokens of the suffix.
    """

    key: tuple[Float[Tensor, "B T G head_dim"], ...]
    value: tuple[Float[Tensor, "B T G head_dim"], ...]
    valid: Bool[Tensor, "B S"]
    suffix: Rotary


def encode(
    model: "Pi0",
    weights: Deployed,
    images: Float[Tensor, "B C 224 224 3"],
    camera_mask: Bool[Tensor, "B C"],
    prompt: Int[Tensor, "B L"],
    prompt_mask: Bool[Tensor, "B L"],
    compiled: bool = False,
    operations: ModuleType = kernels_plain,
) -> "tuple[Encoded, Selection]":
    """Tokens, and which of them are kept.

    Args:
        model: of which no parameter is read.
        weights: its parameters.
        images, camera_mask, prompt, prompt_mask: see `Pi0.embed`.
        compiled: whether Inductor compiles the layers.
        operations: `kernels`, or `kernels_plain`.
    """
    inputs = (images, camera_mask, prompt, prompt_mask)
    encoded = embed(model, weights, *inputs, compiled, operations)
    return encoded, model.select(encoded, operations)


def embed(
    model: "Pi0",
    weights: Deployed,
    images: Float[Tensor, "B C 224 224 3"],
    camera_mask: Bool[Tensor, "B C"],
    prompt: Int[Tensor, "B L"],
    prompt_mask: Bool[Tensor, "B L"],
    compiled: bool = False,
    operations: ModuleType = kernels_plain,
) -> "Encoded":
    """`Pi0.embed`, over deployed weights."""
    from pruner_torch.pi0 import Encoded  # here, since pi0 imports this module

    variant, dtype = model.config.vision, model.dtype
    pictures = images.flatten(0, 1)
    patches = see(weights.vision, pictures, variant, dtype, compiled, operations)
    rows = F.embedding(prompt, weights.embedding).to(dtype)
    root = torch.full((), rows.shape[-1] ** 0.5, dtype=rows.dtype, device=rows.device)
    return Encoded(
        patches=patches.reshape(*images.shape[:2], *patches.shape[1:]),
        camera_mask=camera_mask,
        prompt=rows * root,
        prompt_mask=prompt_mask,
    )


def act(
    model: "Pi0",
    weights: Deployed,
    schedule: Schedule,
    encoded: "Encoded",
    selection: Selection,
    state: Float[Tensor, "B A"],
    noise: Float[Tensor, "B H A"],
    capacity: int | None,
    compiled: bool = False,
    operations: ModuleType = kernels_plain,
) -> Float[Tensor, "B H A"]:
    """Actions, from the tokens and the selection of `encode`.

    Args:
        model: of which no parameter is read.
        weights: its parameters.
        schedule: its denoising steps.
        encoded, selection: see `encode`.
        state: of the robot; π0.5 reads it in the prompt.
        noise: standard normal.
        capacity: patches after pruning; None where nothing is pruned.
        compiled: whether Inductor compiles the layers.
        operations: `kernels`, or `kernels_plain`.
    """
    prefix = sampling.prune(model, encoded, selection, capacity, operations)
    cache = prefill(model, weights, prefix, compiled, operations)
    return denoise(model, weights, schedule, cache, state, noise, compiled, operations)


def prefill(
    model: "Pi0",
    weights: Deployed,
    prefix: "Prefix",
    compiled: bool = False,
    operations: ModuleType = kernels_plain,
) -> Cache:
    """Keys and values of the prefix."""
    config, head_dim = model.config, model.config.paligemma.head_dim
    batch, length = prefix.valid.shape
    angles = rotary(prefix.positions, head_dim, model.dtype)
    mask = prefix.valid[:, None]  # nobody reads what padding attends to: of keys, it is enough
    room = (batch, length + config.suffix_length, config.paligemma.num_kv_heads, head_dim)
    key, value = (tuple(prefix.tokens.new_empty(room) for _ in weights.language) for _ in range(2))
    layer_of = optimized(_prefix_layer, compiled)
    scales = [layer.attention_scale for layer in weights.language]
    rows = operations.scale_rows(prefix.tokens.flatten(0, 1), scales[0])
    for layer, following, *rooms in zip(weights.language, scales[1:], key, value, strict=False):
        rows = layer_of(layer, rows, angles, mask, *rooms, following, operations)
    # Of the last layer nobody reads more than keys and values.
    outputs = 2 * config.paligemma.num_kv_heads * head_dim
    kernel, angle = weights.language[-1].qkv[:, -outputs:], _of_tokens(angles)
    operations.project(rows, kernel, None, *angle, key[-1], value[-1], 0, 0)
    place = torch.arange(config.suffix_length, device=prefix.length.device)
    suffix = rotary(prefix.length[:, None] + place, head_dim, model.dtype)
    return Cache(key, value, prefix.valid, suffix)


def denoise(
    model: "Pi0",
    weights: Deployed,
    schedule: Schedule,
    cache: Cache,
    state: Float[Tensor, "B A"],
    noise: Float[Tensor, "B H A"],
    compiled: bool = False,
    operations: ModuleType = kernels_plain,
) -> Float[Tensor, "B H A"]:
    """Euler steps from the noise at time 1 to the actions at time 0."""
    mask = _suffix_mask(model, cache.valid)
    first = None if weights.state_in is None else apply_affine(state, weights.state_in)[:, None]
    layer_of = optimized(_suffix_layer, compiled)
    x = noise
    for step in range(schedule.steps):
        norms = [_norms(layer, schedule, step, i) for i, layer in enumerate(weights.action)]
        final = _final_norm(weights, schedule, step)
        following = [*(each.attention_scale for each in norms), final.scale]
        rows = _suffix_rows(model, weights, schedule, step, x, first, following[0], operations)
        for place, layer in enumerate(weights.action):
            past = cache.key[place], cache.value[place]
            inputs = (rows, cache.suffix, mask, *past, following[place + 1])
            rows = layer_of(layer, norms[place], *inputs, operations)
        kernel, bias = weights.action_out.kernel, weights.action_out.bias
        x = operations.euler_step(rows, final.scale, final.shift, kernel, bias, x, schedule.step)
    return x


@dataclasses.dataclass(frozen=True)
class _Norms:
    """Of one layer at one step; see `Modulation`. A gate is None where the residual is added as it
    is, and what is added None where nothing is."""

    attention_scale: Float[Tensor, "E"]
    attention_added: Float[Tensor, "N"] | None
    attention_gate: Float[Tensor, "E"] | None
    mlp_scale: Float[Tensor, "E"]
    mlp_added: Float[Tensor, "N"] | None
    mlp_gate: Float[Tensor, "E"] | None


def _norms(layer: ExpertLayer, schedule: Schedule, step: int, place: int) -> _Norms:
    """A layer's own, or the schedule's."""
    if not schedule.attention:
        return _own_norms(layer)
    attention, mlp = schedule.attention[place], schedule.mlp[place]
    return _Norms(
        *(attention.scale[step], attention.added[step], attention.gate[step]),
        *(mlp.scale[step], mlp.added[step], mlp.gate[step]),
    )


def _own_norms(layer: ExpertLayer) -> _Norms:
    assert layer.attention_scale is not None
    assert layer.mlp_scale is not None
    return _Norms(layer.attention_scale, None, None, layer.mlp_scale, None, None)


def _final_norm(weights: Deployed, schedule: Schedule, step: int) -> Norm:
    if schedule.final is not None:
        assert schedule.final.shift is not None
        return Norm(schedule.final.scale[step], schedule.final.shift[step])
    assert weights.final_norm is not None
    return weights.final_norm


def _suffix_rows(
    model: "Pi0",
    weights: Deployed,
    schedule: Schedule,
    step: int,
    x: Float[Tensor, "B H A"],
    first: Float[Tensor, "B 1 E"] | None,
    scale: Float[Tensor, "E"],
    operations: ModuleType,
) -> kernels_plain.Rows:
    """`Pi0.embed_suffix_at`, as the first norm takes it; `first` is π0's state token."""
    kernel, bias = weights.action_in.kernel, weights.action_in.bias
    if schedule.time is None or weights.time_in is None or weights.time_out is None:
        layer, head_dim = weights.action[0], model.config.paligemma.head_dim
        sizes = len(x) * x.shape[1], layer, head_dim, x.shape[2]
        packed = bool(schedule.attention) and operations.packs(*sizes)
        return operations.embed_actions(x, kernel, bias, scale, model.dtype, packed)
    assert first is not None
    tokens = F.silu(
        apply_affine(apply_affine(x, weights.action_in), weights.time_in) + schedule.time[step]
    )
    tokens = torch.cat([first, apply_affine(tokens, weights.time_out)], dim=1)
    return operations.scale_rows(tokens.to(model.dtype).flatten(0, 1), scale)


def _prefix_layer(
    layer: ExpertLayer,
    rows: kernels_plain.Rows,
    angles: Rotary,
    mask: Bool[Tensor, "B 1 S"],
    key: Float[Tensor, "B T G head_dim"],
    value: Float[Tensor, "B T G head_dim"],
    following: Float[Tensor, "D"],
    operations: ModuleType,
) -> kernels_plain.Rows:
    """A layer of the language model; its keys and values are the first of `key` and `value`."""
    norms, length = _own_norms(layer), mask.shape[2]
    return _layer(layer, norms, rows, angles, mask, key, value, 0, length, following, operations)


def _suffix_layer(
    layer: ExpertLayer,
    norms: _Norms,
    rows: kernels_plain.Rows,
    angles: Rotary,
    mask: Bool[Tensor, "B _ T"],
    key: Float[Tensor, "B T G head_dim"],
    value: Float[Tensor, "B T G head_dim"],
    following: Float[Tensor, "E"],
    operations: ModuleType,
) -> kernels_plain.Rows:
    """A layer of the action expert; its keys and values are written behind the prefix's."""
    room = mask.shape[2]
    place = room - angles.cos.shape[1]
    return _layer(layer, norms, rows, angles, mask, key, value, place, room, following, operations)


def _layer(
    layer: ExpertLayer,
    norms: _Norms,
    rows: kernels_plain.Rows,
    angles: Rotary,
    mask: Bool[Tensor, "B _ S"],
    key: Float[Tensor, "B T G head_dim"],
    value: Float[Tensor, "B T G head_dim"],
    place: int,
    length: int,
    following: Float[Tensor, "D"],
    operations: ModuleType,
) -> kernels_plain.Rows:
    """A layer of either expert.

    Args:
        layer, norms: its weights.
        rows: its input.
        angles: RoPE of its tokens.
        mask: which keys they may attend to.
        key, value: their keys and values are written from `place` on.
        place: of the first token.
        length: keys that are there afterwards.
        following: the scale of the norm that comes after the layer.
        operations: `kernels`, or `kernels_plain`.
    """
    head_dim = key.shape[-1]
    added, heads = norms.attention_added, len(layer.out) // head_dim
    query, key, value = operations.project(
        rows, layer.qkv, added, *_of_tokens(angles), key, value, place, heads
    )
    packed = kernels_plain.is_packed(rows.scaled)
    attended = _attend(query, key[:, :length], value[:, :length], mask, packed, operations)
    attended = attended if packed else attended.flatten(0, 1)
    rows = operations.merge(attended, layer.out, rows.x, norms.attention_gate, norms.mlp_scale)
    gated = operations.gated(rows, layer.gate_up, norms.mlp_added)
    return operations.merge(gated, layer.down, rows.x, norms.mlp_gate, following)


def _of_tokens(angles: Rotary) -> tuple[Float[Tensor, "B S half"], Float[Tensor, "B S half"]]:
    """Cosines and sines, without the axis of heads."""
    return angles.cos[:, :, 0], angles.sin[:, :, 0]


def _suffix_mask(model: "Pi0", valid: Bool[Tensor, "B S"]) -> Bool[Tensor, "B _ T"]:
    """Who of the suffix may attend to whom; one row where all see the same."""
    batch, length = valid.shape
    size = model.config.suffix_length
    if model.config.pi05:
        return torch.cat([valid, valid.new_ones(batch, size)], dim=1)[:, None]
    place = torch.arange(length + size, device=valid.device)
    sees = place <= torch.where(place[length:, None] == length, length, length + size)
    before = torch.cat([valid, valid.new_ones(batch, size)], dim=1)
    return before[:, None] & sees


def _attend(
    query: Float[Tensor, "B S K head_dim"],
    key: Float[Tensor, "B T G head_dim"],
    value: Float[Tensor, "B T G head_dim"],
    mask: Bool[Tensor, "B _ T"],
    packed: bool,
    operations: ModuleType,
) -> Tensor:
    """Softmax attention of queries that are scaled already: [B, S, K * head_dim], or packed."""
    if key.shape[2] == 1 and mask.shape[1] == 1:
        return operations.attend(query, key, value, mask[:, 0], packed)
    return attend(query, key, value, mask.expand(-1, query.shape[1], -1))
