"""The fast way from an observation to actions, over `Deployed` weights.

What `sampling` computes, but for rounding. No layer is asked for what nobody reads (the last one of
the prefix gives keys and values alone), keys and values are written where the denoising steps read
them, and what every call would compute again is looked up.

A call is two functions of static shapes, `encode` and `act`, and, with the implicit selection, one
read of an integer between them. On an NVIDIA GPU both are CUDA graphs.

Dimension letters: B batch, C cameras, N patches, L prompt tokens, S prefix, H suffix, T = S + H,
D width, E width of the suffix, K heads, G kv heads, A action dim.
"""

import dataclasses
import logging
import math
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pruner_spec.config import VisionVariant
from pruner_spec.inference import InferenceSettings
from pruner_spec.observation import EncodingPlan, Observation
from pruner_torch import kernels, kernels_autotune, kernels_plain, sampling
from pruner_torch.deployed import (
    Affine,
    Deployed,
    ExpertLayer,
    Norm,
    Schedule,
    Vision,
    VisionBlock,
    clock_of,
    deploy,
    schedule,
)
from pruner_torch.gemma import Rotary, rotary
from pruner_torch.graphs import Graphs
from pruner_torch.layers import LAYER_NORM_EPSILON, attend, gelu, wide
from pruner_torch.pruner import Selection
from pruner_torch.recomputation import optimized
from pruner_torch.siglip import patchify

if TYPE_CHECKING:
    from pruner_torch.pi0 import Encoded, Pi0, Prefix

# Two ways that only round differently are a tenth of this apart, also in bfloat16.
_APART = 0.25

logger = logging.getLogger(__name__)


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


class Sampler:
    """A deployed model: its `sample_actions` is the model's, and so are the statistics it leaves.

    What it packs are copies: a model that is trained further is deployed anew.

    Args:
        model: whose weights these are.
        settings: None for the defaults.
    """

    def __init__(self, model: "Pi0", settings: InferenceSettings | None = None) -> None:
        self.model = model
        self.settings = InferenceSettings() if settings is None else settings
        self._weights, self._clock = deploy(model), clock_of(model)
        self._schedules: dict[int, Schedule] = {}
        self._rooms: dict[tuple[int, ...], int | None] = {}  # of the last call of these sizes
        self._tuned: set[int] = set()  # lengths of the prefix
        # While something is being traced, `kernels` are `kernels_plain`.
        operations = kernels if self.settings.kernels else kernels_plain
        self._ways: Any = {"compiled": self.settings.compiled, "operations": operations}
        has_graphs = self.settings.graphs and model.device.type == "cuda"
        self._graphs = Graphs(model.device, self.settings.max_graphs) if has_graphs else None

    def sample_actions(
        self,
        observation: Observation,
        noise: Float[Tensor, "B H A"],
        num_steps: int = 10,
    ) -> Float[Tensor, "B H A"]:
        """Actions, denoised from the noise. See `sampling.sample_actions`."""
        return sampling.sample_actions(self.model, observation, noise, num_steps, stages=self)

    @torch.no_grad()
    def warm_up(
        self,
        observation: Observation,
        noise: Float[Tensor, "B H A"],
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
        self._rooms.clear()  # none of these was an observation's

    @torch.no_grad()
    def distance(
        self,
        model: "Pi0",
        observation: Observation,
        noise: Float[Tensor, "B H A"],
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

        def call(*inputs: Any) -> "tuple[Encoded, Selection]":
            return encode(self.model, self._weights, *inputs, **self._ways)

        return self._replayed(call, _inputs_of(observation, plan), (), ("encode",))

    def act(
        self,
        encoded: "Encoded",
        selection: Selection,
        state: Float[Tensor, "B A"],
        noise: Float[Tensor, "B H A"],
        capacity: int | None,
        num_steps: int,
    ) -> Float[Tensor, "B H A"]:
        """See `sampling.Stages`."""
        self._rooms[_sizes(encoded)] = capacity
        self._tune(_prefix_length(encoded, capacity))
        steps = self._schedule(num_steps)

        def call(state: Tensor, noise: Tensor, *standing: Tensor) -> Tensor:
            read, chosen = type(encoded)(*standing[:4]), Selection(*standing[4:])
            inputs = (steps, read, chosen, state, noise, capacity)
            return act(self.model, self._weights, *inputs, **self._ways)

        standing = (*_tensors(encoded), *_tensors(selection))
        actions = self._replayed(call, (state, noise), standing, ("act", capacity, num_steps))
        return actions if self._graphs is None else actions.clone()

    def expected(self, encoded: "Encoded") -> int | None:
        """See `sampling.Stages`."""
        return self._rooms.get(_sizes(encoded)) if self.settings.guess else None

    def embed(self, observation: Observation, plan: EncodingPlan) -> "Encoded":
        """See `sampling.Stages`."""

        def call(*inputs: Any) -> "Encoded":
            return embed(self.model, self._weights, *inputs, **self._ways)

        return self._replayed(call, _inputs_of(observation, plan), (), ("embed",))

    def select(self, encoded: "Encoded") -> Selection:
        """See `sampling.Stages`."""

        def call(*standing: Tensor) -> Selection:
            return self.model.select(type(encoded)(*standing), self._ways["operations"])

        return self._replayed(call, (), _tensors(encoded), ("select",))

    def prune(self, encoded: "Encoded", selection: Selection, capacity: int | None) -> "Prefix":
        """See `sampling.Stages`."""

        def call(*standing: Tensor) -> "Prefix":
            read, chosen = type(encoded)(*standing[:4]), Selection(*standing[4:])
            operations = self._ways["operations"]
            return sampling.prune(self.model, read, chosen, capacity, operations)

        standing = (*_tensors(encoded), *_tensors(selection))
        return self._replayed(call, (), standing, ("prune", capacity))

    def prefill(self, prefix: "Prefix") -> Cache:
        """See `sampling.Stages`."""

        def call(*standing: Tensor) -> Cache:
            read = type(prefix)(*standing)
            return prefill(self.model, self._weights, read, **self._ways)

        return self._replayed(call, (), _tensors(prefix), ("prefill",))

    def denoise(
        self,
        prefix: "Prefix",
        cache: Cache,
        state: Float[Tensor, "B A"],
        noise: Float[Tensor, "B H A"],
        num_steps: int,
    ) -> Float[Tensor, "B H A"]:
        """See `sampling.Stages`."""
        self._tune(cache.valid.shape[1])
        steps, layers = self._schedule(num_steps), len(cache.key)

        def call(state: Tensor, noise: Tensor, *standing: Tensor) -> Tensor:
            valid, cos, sin = standing[2 * layers :]
            key, value = standing[:layers], standing[layers : 2 * layers]
            read = Cache(key, value, valid, Rotary(cos, sin))
            return denoise(self.model, self._weights, steps, read, state, noise, **self._ways)

        standing = (*cache.key, *cache.value, cache.valid, *_tensors(cache.suffix))
        return self._replayed(call, (state, noise), standing, ("denoise", num_steps))

    def _replayed(
        self,
        call: Callable[..., Any],
        fresh: tuple[Tensor, ...],
        standing: tuple[Tensor, ...],
        key: tuple[Any, ...],
    ) -> Any:
        """The result of a call; of a graph's, which the next one overwrites."""
        if self._graphs is None:
            return call(*fresh, *standing)
        shapes = tuple(tuple(x.shape) for x in (*fresh, *standing))
        return self._graphs((*key, shapes), call, fresh, standing)

    def _tune(self, prefix: int) -> None:
        """Times tiles, if asked to, before what reads so long a prefix is captured."""
        launches = self.settings.kernels and not self.settings.compiled
        if not (self.settings.autotune and launches) or prefix in self._tuned:
            return
        self._tuned.add(prefix)
        config, expert = self.model.config, self.model.config.action_expert
        has_kernel = config.pi05 and expert.num_kv_heads == 1  # see `_attend`
        rows = config.suffix_length
        keys = prefix + rows if has_kernel else None
        kernels_autotune.autotune(self._weights.action, rows, keys, expert.head_dim)

    def _schedule(self, num_steps: int) -> Schedule:
        if num_steps not in self._schedules:
            self._schedules[num_steps] = schedule(
                self._clock, self._weights.action, num_steps, self.model.dtype
            )
        return self._schedules[num_steps]


def tried(
    model: "Pi0",
    observation: Observation,
    noise: Float[Tensor, "B H A"],
    num_steps: int = 10,
    settings: InferenceSettings | None = None,
) -> sampling.Stages:
    """A sampler, if it gives the plain way's actions here; and else the plain way.

    It depends on the GPU and on what is installed, and a robot must not be the one to find out.

    Args:
        model: whose weights these are.
        observation, noise: to try it with.
        num_steps: Euler steps.
        settings: of the sampler.
    """
    try:
        sampler = Sampler(model, settings)
        sampler.sample_actions(observation, noise, num_steps)
        there = torch.as_tensor(noise, device=model.device).to(wide(model.dtype))
        apart = sampler.distance(model, observation, there, num_steps)
        if apart <= _APART:
            return sampler
        reason = f"its actions are {apart:.1e} from the plain way's"
    except Exception as error:  # a compiler's, a driver's: whatever it is, there is another way
        logger.debug("the fast way failed", exc_info=True)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    logger.warning("the fast way is not taken, %s; the plain one is slower", reason)
    return sampling.PlainStages(model)


def _inputs_of(observation: Observation, plan: EncodingPlan) -> tuple[Tensor, ...]:
    """What `encode` reads of an observation: images, camera mask, prompt, prompt mask."""
    return (
        torch.stack([observation.images[camera] for camera in plan.cameras], dim=1),
        torch.stack([observation.image_masks[camera] for camera in plan.cameras], dim=1),
        observation.tokenized_prompt[:, : plan.prompt_length],
        observation.tokenized_prompt_mask[:, : plan.prompt_length],
    )


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


def see(
    weights: Vision,
    images: Float[Tensor, "B height width 3"],
    variant: VisionVariant,
    dtype: torch.dtype,
    compiled: bool = False,
    operations: ModuleType = kernels_plain,
) -> Float[Tensor, "B N D"]:
    """The vision tower: `SigLip.__call__`."""
    pixels = patchify(images.to(wide(dtype)), variant.patch_size)
    x = _affine(pixels, weights.patch_embedding).to(dtype)
    block_of = optimized(_vision_block, compiled)
    norms = [*(block.attention_norm for block in weights.blocks), weights.final_norm]
    normed = _layer_norm(x, norms[0])
    for block, following in zip(weights.blocks, norms[1:], strict=True):
        x, normed = block_of(block, following, x, normed, variant.num_heads, operations)
    return _affine(normed, weights.head)


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
    first = None if weights.state_in is None else _affine(state, weights.state_in)[:, None]
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
        return operations.embed_actions(x, kernel, bias, scale, model.dtype)
    assert first is not None
    tokens = F.silu(_affine(_affine(x, weights.action_in), weights.time_in) + schedule.time[step])
    tokens = torch.cat([first, _affine(tokens, weights.time_out)], dim=1)
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
    attended = _attend(query, key[:, :length], value[:, :length], mask, operations).flatten(0, 1)
    rows = operations.merge(attended, layer.out, rows.x, norms.attention_gate, norms.mlp_scale)
    gated = operations.gated(rows, layer.gate_up, norms.mlp_added)
    return operations.merge(gated, layer.down, rows.x, norms.mlp_gate, following)


def _of_tokens(angles: Rotary) -> tuple[Float[Tensor, "B S half"], Float[Tensor, "B S half"]]:
    """Cosines and sines, without the axis of heads."""
    return angles.cos[:, :, 0], angles.sin[:, :, 0]


def _vision_block(
    block: VisionBlock,
    following: Norm,
    x: Float[Tensor, "B N D"],
    normed: Float[Tensor, "B N D"],
    num_heads: int,
    operations: ModuleType,
) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B N D"]]:
    """A block's output, and that through the norm of the block that follows; so are its inputs."""
    qkv = _affine(normed, block.qkv)
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x, normed = _add_layer_norm(x, _affine(attended, block.out), block.mlp_norm, operations)
    activated = _gelu_affine(normed, block.up)
    return _add_layer_norm(x, _affine(activated, block.down), following, operations)


def _add_layer_norm(
    x: Float[Tensor, "B N D"], y: Float[Tensor, "B N D"], norm: Norm, operations: ModuleType
) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B N D"]]:
    """x + y, and its layer norm."""
    assert norm.shift is not None
    return operations.add_layer_norm(x, y, norm.scale, norm.shift, LAYER_NORM_EPSILON)


def _gelu_affine(x: Float[Tensor, "B N inputs"], affine: Affine) -> Float[Tensor, "B N outputs"]:
    """GELU of a product. cuBLASLt has its tanh approximation; on a CPU the operation is exact."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    if affine.bias is None or not (x.is_cuda and half) or torch.compiler.is_compiling():
        return gelu(_affine(x, affine))
    rows = x.flatten(0, 1)
    return torch._addmm_activation(affine.bias, rows, affine.kernel, use_gelu=True).view(
        *x.shape[:2], -1
    )


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


def _affine(x: Float[Tensor, "*batch inputs"], affine: Affine) -> Float[Tensor, "*batch outputs"]:
    if affine.bias is None or affine.bias.ndim == 1:
        return F.linear(x, affine.kernel.T, affine.bias)
    return x @ affine.kernel + affine.bias


def _layer_norm(x: Float[Tensor, "B N D"], norm: Norm) -> Float[Tensor, "B N D"]:
    return F.layer_norm(x, norm.scale.shape, norm.scale, norm.shift, LAYER_NORM_EPSILON)


def _attend(
    query: Float[Tensor, "B S K head_dim"],
    key: Float[Tensor, "B T G head_dim"],
    value: Float[Tensor, "B T G head_dim"],
    mask: Bool[Tensor, "B _ T"],
    operations: ModuleType,
) -> Float[Tensor, "B S K*head_dim"]:
    """Softmax attention of queries that are scaled already."""
    if key.shape[2] == 1 and mask.shape[1] == 1:
        return operations.attend(query, key, value, mask[:, 0])
    return attend(query, key, value, mask.expand(-1, query.shape[1], -1))


def _tensors(record: Any) -> tuple[Tensor, ...]:
    """The fields of a dataclass."""
    return tuple(getattr(record, field.name) for field in dataclasses.fields(record))


def _sizes(encoded: "Encoded") -> tuple[int, ...]:
    """On which the shapes of a call depend."""
    return *encoded.patches.shape[:2], encoded.prompt.shape[1]


def _prefix_length(encoded: "Encoded", capacity: int | None) -> int:
    """Tokens of the prefix, padding counted."""
    cameras, patches = encoded.patches.shape[1:3]
    return (cameras * patches if capacity is None else capacity) + encoded.prompt.shape[1]


def _distance(found: Float[Tensor, "*shape"], expected: Float[Tensor, "*shape"]) -> float:
    """Norm of the difference, over the norm of what is expected; infinite for NaN."""
    found, expected = found.double(), expected.double()
    apart = float((found - expected).norm() / expected.norm())
    return apart if math.isfinite(apart) else math.inf
