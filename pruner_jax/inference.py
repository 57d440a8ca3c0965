"""The fast way from an observation to actions, over `Deployed` weights.

What `sampling` computes, but for rounding. No layer is asked for what nobody reads (the last one of
the prefix gives keys and values alone), and what every call would compute again is looked up. Small
products and attention go through `kernels`, Triton's on a GPU.

A call is two compiled functions of static shapes, `encode` and `act`, and, with the implicit
selection, one read of an integer between them.

Dimension letters: B batch, C cameras, N patches, L prompt tokens, S prefix, H suffix, T = S + H,
D width, E width of the suffix, K heads, G kv heads, A action dim.
"""

import dataclasses
import functools
import logging
import math
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pruner_jax import kernels, kernels_autotune, kernels_plain, sampling, triton_call
from pruner_jax.deployed import (
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
from pruner_jax.gemma import Rotary, rotary
from pruner_jax.kernels import OfStep, Rows
from pruner_jax.layers import LAYER_NORM_EPSILON, attend, wide
from pruner_jax.pruner import Selection
from pruner_jax.siglip import patchify
from pruner_spec.config import VisionVariant
from pruner_spec.inference import InferenceSettings
from pruner_spec.observation import EncodingPlan, Observation

if TYPE_CHECKING:
    from pruner_jax.pi0 import Encoded, Pi0, Prefix


logger = logging.getLogger(__name__)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys (after RoPE) and values of the prefix, and room for those of the suffix.

    Attributes:
        key, value: one a layer.
        valid: bool [B, S].
        suffix: RoPE of the H tokens of the suffix.
    """

    key: tuple[Float[Array, "B T G head_dim"], ...]
    value: tuple[Float[Array, "B T G head_dim"], ...]
    valid: Bool[Array, "B S"]
    suffix: Rotary


class Sampler:
    """A deployed model: its `sample_actions` is the model's, and so are the statistics it leaves.

    What it packs are copies: a model that is trained further is deployed anew.

    Args:
        model: whose weights these are.
        settings: None for the defaults.

    Raises:
        ValueError: the settings ask for what only PyTorch has.
    """

    def __init__(self, model: "Pi0", settings: InferenceSettings | None = None) -> None:
        self.settings = InferenceSettings() if settings is None else settings
        self.settings.check_for_jax()
        graph, state = nnx.split(model)
        # Without parameters, so that those of the model may go; the record is the model's.
        self.model = nnx.merge(graph, jax.eval_shape(lambda: state))
        weights = self._weights = deploy(model)
        self._clock = clock_of(model)
        # Each array that a function is handed takes its time: none that it does not read.
        nothing = jax.tree.map(lambda _: None, weights.vision)
        self._seeing = dataclasses.replace(weights, language=(), action=())
        self._acting = dataclasses.replace(weights, vision=nothing)
        self._schedules: dict[int, Schedule] = {}
        self._rooms: dict[tuple[int, ...], int | None] = {}  # of the last call of these sizes
        self._tuned: set[int] = set()  # lengths of the prefix
        # Kernels depend on compilers and drivers: what launches them is tried once.
        launches = self.settings.kernels and triton_call.available()
        self._untried = {"_encode", "_act"} if launches else set()
        self._compile(kernels if self.settings.kernels else kernels_plain)

    def _compile(self, operations: ModuleType) -> None:
        self._operations = operations
        # XLA's command buffers are its CUDA graphs, here of no kind of operation.
        launches_each = not self.settings.graphs and jax.default_backend() == "gpu"
        options = {"xla_gpu_enable_command_buffer": ""} if launches_each else None
        jit = functools.partial(jax.jit, compiler_options=options)

        def over(function: Any) -> Any:
            return functools.partial(function, self.model, operations=operations)

        self._encode = jit(over(_encode), static_argnums=3)
        self._act = jit(over(act), static_argnums=6)
        self._embed = jit(over(_embed), static_argnums=3)
        self._select = jit(self.model.select)
        self._prune = jit(functools.partial(sampling.prune, self.model), static_argnums=2)
        self._prefill = jit(over(prefill))
        self._denoise = jit(over(denoise))

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
        self._rooms.clear()  # none of these was an observation's

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
        return self._run("_encode", self._seeing, *_inputs_of(observation, plan))

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
        self._rooms[_sizes(encoded)] = capacity
        self._tune(_prefix_length(encoded, capacity))
        steps = self._schedule(num_steps)
        inputs = (self._acting, steps, encoded, selection, state, noise, capacity)
        return self._run("_act", *inputs)

    def expected(self, encoded: "Encoded") -> int | None:
        """See `sampling.Stages`."""
        return self._rooms.get(_sizes(encoded)) if self.settings.guess else None

    def embed(self, observation: Observation, plan: EncodingPlan) -> "Encoded":
        """See `sampling.Stages`."""
        return self._embed(self._seeing, *_inputs_of(observation, plan))

    def select(self, encoded: "Encoded") -> Selection:
        """See `sampling.Stages`."""
        return self._select(encoded)

    def prune(self, encoded: "Encoded", selection: Selection, capacity: int | None) -> "Prefix":
        """See `sampling.Stages`."""
        return self._prune(encoded, selection, capacity)

    def prefill(self, prefix: "Prefix") -> Cache:
        """See `sampling.Stages`."""
        return self._prefill(self._acting, prefix)

    def denoise(
        self,
        prefix: "Prefix",
        cache: Cache,
        state: Float[Array, "B A"],
        noise: Float[Array, "B H A"],
        num_steps: int,
    ) -> Float[Array, "B H A"]:
        """See `sampling.Stages`."""
        self._tune(cache.valid.shape[1])
        return self._denoise(self._acting, self._schedule(num_steps), cache, state, noise)

    def _tune(self, prefix: int) -> None:
        """Times tiles, if asked to, before what reads so long a prefix is compiled."""
        launches = self._operations is kernels
        if not (self.settings.autotune and launches) or prefix in self._tuned:
            return
        self._tuned.add(prefix)
        config, expert = self.model.config, self.model.config.action_expert
        has_kernel = config.pi05 and expert.num_kv_heads == 1  # see `_attend`
        rows = config.suffix_length
        keys = prefix + rows if has_kernel else None
        kernels_autotune.autotune(self._weights.action, rows, keys, expert.head_dim)

    def _run(self, name: str, *inputs: Any) -> Any:
        """A function's result; where the kernels do not run, by XLA alone from then on."""
        if name not in self._untried:
            return getattr(self, name)(*inputs)
        try:
            result = jax.block_until_ready(getattr(self, name)(*inputs))
        except Exception as error:  # a compiler's, a driver's: whatever it is, there is another way
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            logger.warning("the Triton kernels do not run here, %s; XLA's are slower", reason)
            logger.debug("the Triton kernels failed", exc_info=True)
            self._untried.clear()
            self._compile(kernels_plain)
            return getattr(self, name)(*inputs)
        self._untried.discard(name)
        return result

    def _schedule(self, num_steps: int) -> Schedule:
        if num_steps not in self._schedules:
            layers, dtype = self._weights.action, self.model.dtype
            self._schedules[num_steps] = schedule(self._clock, layers, num_steps, dtype)
        return self._schedules[num_steps]


def _inputs_of(observation: Observation, plan: EncodingPlan) -> tuple[Any, ...]:
    """What `encode` reads of an observation, as the host sends it to the device.

    Returns:
        images, a camera each; camera masks, prompt and prompt mask, on the host one array of
        integers, [B, C + 2*L], since each that it sends takes its time; L.
    """
    length = plan.prompt_length
    images = tuple(observation.images[camera] for camera in plan.cameras)
    masks = [observation.image_masks[camera] for camera in plan.cameras]
    prompt = (observation.tokenized_prompt, observation.tokenized_prompt_mask)
    if not all(isinstance(part, np.ndarray) for part in (*masks, *prompt)):
        return images, (*masks, *prompt), length
    parts = (*(mask[:, None] for mask in masks), *(part[:, :length] for part in prompt))
    packed = np.concatenate([part.astype(np.int32) for part in parts], axis=1)
    return images, packed, length


def encode(
    model: "Pi0",
    weights: Deployed,
    images: Float[Array, "B C 224 224 3"],
    camera_mask: Bool[Array, "B C"],
    prompt: Int[Array, "B L"],
    prompt_mask: Bool[Array, "B L"],
    operations: ModuleType = kernels_plain,
) -> "tuple[Encoded, Selection]":
    """Tokens, and which of them are kept.

    Args:
        model: of which no parameter is read.
        weights: its parameters.
        images, camera_mask, prompt, prompt_mask: see `Pi0.embed`.
        operations: `kernels`, or `kernels_plain`.
    """
    encoded = embed(model, weights, images, camera_mask, prompt, prompt_mask, operations)
    return encoded, model.select(encoded)


def embed(
    model: "Pi0",
    weights: Deployed,
    images: Float[Array, "B C 224 224 3"],
    camera_mask: Bool[Array, "B C"],
    prompt: Int[Array, "B L"],
    prompt_mask: Bool[Array, "B L"],
    operations: ModuleType = kernels_plain,
) -> "Encoded":
    """`Pi0.embed`, over deployed weights."""
    from pruner_jax.pi0 import Encoded  # here, since pi0 imports this module

    variant, dtype = model.config.vision, model.dtype
    together = images.reshape(-1, *images.shape[2:])
    patches = see(weights.vision, together, variant, dtype, operations)
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
    operations: ModuleType = kernels_plain,
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
        operations: `kernels`, or `kernels_plain`.
    """
    prefix = sampling.prune(model, encoded, selection, capacity)
    cache = prefill(model, weights, prefix, operations)
    return denoise(model, weights, schedule, cache, state, noise, operations)


def see(
    weights: Vision,
    images: Float[Array, "B height width 3"],
    variant: VisionVariant,
    dtype: jnp.dtype,
    operations: ModuleType = kernels_plain,
) -> Float[Array, "B N D"]:
    """The vision tower: `SigLip.__call__`."""
    pixels = patchify(images.astype(wide(dtype)), variant.patch_size)
    x = _affine(pixels, weights.patch_embedding).astype(dtype)
    norms = [*(block.attention_norm for block in weights.blocks), weights.final_norm]
    normed = _layer_norm(x, norms[0])
    for block, following in zip(weights.blocks, norms[1:], strict=True):
        x, normed = _vision_block(block, following, x, normed, variant.num_heads, operations)
    return _affine(normed, weights.head)


def prefill(
    model: "Pi0", weights: Deployed, prefix: "Prefix", operations: ModuleType = kernels_plain
) -> Cache:
    """Keys and values of the prefix."""
    config, head_dim = model.config, model.config.paligemma.head_dim
    batch, length = prefix.valid.shape
    angles = rotary(prefix.positions, head_dim, model.dtype)
    room = (batch, length + config.suffix_length, config.paligemma.num_kv_heads, head_dim)
    empty = jnp.zeros(room, model.dtype)
    norms = [_own_norms(layer) for layer in weights.language]
    first, *following = (each.attention_scale for each in norms)
    rows = kernels_plain.scale_rows(prefix.tokens.reshape(batch * length, -1), first)
    written = []
    for layer, here, scale in zip(weights.language, norms, following, strict=False):
        rows, *both = _prefix_layer(
            layer, here, scale, rows, angles, prefix.valid, empty, operations
        )
        written.append(both)
    written.append(_project_keys(weights.language[-1], rows, angles, empty))
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
    operations: ModuleType = kernels_plain,
) -> Float[Array, "B H A"]:
    """Euler steps from the noise at time 1 to the actions at time 0."""
    mask, place = _suffix_mask(model, cache.valid), cache.valid.shape[1]
    token = None if weights.state_in is None else _affine(state, weights.state_in)[:, None]
    out = weights.action_out
    assert out.bias is not None

    def advance(carry: _Carry, step: Int[Array, ""]) -> tuple[_Carry, None]:
        x, keys, values = carry
        norms = _norms(weights, schedule, step)
        scale, shift = _final_norm(weights, schedule, step)
        first, *following = (*(each.attention_scale for each in norms), scale)
        rows = _suffix_rows(model, weights, schedule, step, x, token, first, operations)
        written = []
        for i, layer in enumerate(weights.action):
            past = keys[i], values[i]
            rows, *both = _suffix_layer(
                layer, norms[i], following[i], rows, cache.suffix, mask, past, place, operations
            )
            written.append(both)
        kernel, bias = out.kernel, out.bias
        x = operations.euler_step(rows, scale, shift, kernel, bias, x, schedule.step)
        keys, values = zip(*written, strict=True)
        return (x, keys, values), None

    steps = jnp.arange(schedule.steps, dtype=jnp.int32)
    (x, _, _), _ = jax.lax.scan(advance, (noise, cache.key, cache.value), steps)
    return x


# Actions, and the keys and values of all layers, whose last H a step writes anew.
_Carry = tuple[Float[Array, "B H A"], tuple[Array, ...], tuple[Array, ...]]
_Vector = Float[Array, "N"] | OfStep


@dataclasses.dataclass(frozen=True)
class _Norms:
    """Of one layer at one step; None where nothing is added, or a residual as it is."""

    attention_scale: _Vector
    attention_added: _Vector | None
    attention_gate: _Vector | None
    mlp_scale: _Vector
    mlp_added: _Vector | None
    mlp_gate: _Vector | None


def _own_norms(layer: ExpertLayer) -> _Norms:
    assert layer.attention_scale is not None
    assert layer.mlp_scale is not None
    return _Norms(layer.attention_scale, None, None, layer.mlp_scale, None, None)


def _norms(weights: Deployed, schedule: Schedule, step: Int[Array, ""]) -> tuple[_Norms, ...]:
    """The layers' own, or the schedule's."""
    if not schedule.attention:
        return tuple(_own_norms(layer) for layer in weights.action)
    return tuple(
        _Norms(
            *(OfStep(table, step) for table in (attention.scale, attention.added, attention.gate)),
            *(OfStep(table, step) for table in (mlp.scale, mlp.added, mlp.gate)),
        )
        for attention, mlp in zip(schedule.attention, schedule.mlp, strict=True)
    )


def _final_norm(
    weights: Deployed, schedule: Schedule, step: Int[Array, ""]
) -> tuple[_Vector, _Vector | None]:
    """Scale and shift."""
    if schedule.final is None or schedule.final.shift is None:
        assert weights.final_norm is not None
        return weights.final_norm.scale, None
    return OfStep(schedule.final.scale, step), OfStep(schedule.final.shift, step)


def _suffix_rows(
    model: "Pi0",
    weights: Deployed,
    schedule: Schedule,
    step: Int[Array, ""],
    x: Float[Array, "B H A"],
    token: Float[Array, "B 1 E"] | None,
    scale: _Vector,
    operations: ModuleType,
) -> Rows:
    """`Pi0.embed_suffix_at`; `token` is π0's of the state, `scale` the first norm's."""
    action_in = weights.action_in
    if schedule.time is None or weights.time_in is None or weights.time_out is None:
        return operations.embed_actions(x, action_in.kernel, action_in.bias, scale, model.dtype)
    assert token is not None
    tokens = _affine(_affine(x, action_in), weights.time_in) + schedule.time[step]
    tokens = jnp.concatenate([token, _affine(jax.nn.silu(tokens), weights.time_out)], axis=1)
    tokens = tokens.reshape(-1, tokens.shape[-1])
    return operations.scale_rows(tokens.astype(model.dtype), scale)


def _prefix_layer(
    layer: ExpertLayer,
    norms: _Norms,
    following: _Vector,
    rows: Rows,
    angles: Rotary,
    valid: Bool[Array, "B S"],
    empty: Float[Array, "B T G head_dim"],
    operations: ModuleType,
) -> tuple[Rows, Float[Array, "B T G head_dim"], Float[Array, "B T G head_dim"]]:
    """A layer of the language model; its keys and values are written into `empty`.

    A library multiplies many rows best. Nobody reads what padding attends to, so that a mask of
    keys is enough.
    """
    head_dim = 2 * angles.cos.shape[-1]
    query, key, value = kernels_plain.project(
        rows, layer.qkv, None, *_tables(angles), empty, empty, 0, len(layer.out) // head_dim
    )
    attended = _attend(query, key, value, valid[:, None], operations)
    rows = _mlp(layer, norms, following, rows, attended, kernels_plain)
    return rows, key, value


def _suffix_layer(
    layer: ExpertLayer,
    norms: _Norms,
    following: _Vector,
    rows: Rows,
    angles: Rotary,
    mask: Bool[Array, "B _ T"],
    past: tuple[Float[Array, "B T G head_dim"], Float[Array, "B T G head_dim"]],
    place: int,
    operations: ModuleType,
) -> tuple[Rows, Float[Array, "B T G head_dim"], Float[Array, "B T G head_dim"]]:
    """A layer of the action expert; its keys and values are those in `past` from `place` on."""
    layer = _inputs_first(layer)
    heads = len(layer.out) // past[0].shape[-1]
    query, key, value = operations.project(
        rows, layer.qkv, norms.attention_added, *_tables(angles), *past, place, heads
    )
    attended = _attend(query, key, value, mask, operations)
    rows = _mlp(layer, norms, following, rows, attended, operations)
    return rows, key, value


def _mlp(
    layer: ExpertLayer,
    norms: _Norms,
    following: _Vector,
    rows: Rows,
    attended: Float[Array, "B S K*head_dim"],
    operations: ModuleType,
) -> Rows:
    """What comes after attention; `following` is the scale of the norm after the layer."""
    attended = attended.reshape(len(rows.x), -1)
    rows = operations.merge(attended, layer.out, rows.x, norms.attention_gate, norms.mlp_scale)
    gated = operations.gated(rows, layer.gate_up, norms.mlp_added)
    return operations.merge(gated, layer.down, rows.x, norms.mlp_gate, following)


def _project_keys(
    layer: ExpertLayer, rows: Rows, angles: Rotary, empty: Float[Array, "B T G head_dim"]
) -> tuple[Float[Array, "B T G head_dim"], Float[Array, "B T G head_dim"]]:
    """Of the last layer of the prefix nobody reads more than keys and values."""
    outputs = 2 * empty.shape[2] * empty.shape[3]
    kernel = layer.qkv[:, -outputs:]
    return kernels_plain.project(rows, kernel, None, *_tables(angles), empty, empty, 0, 0)[1:]


def _inputs_first(layer: ExpertLayer) -> ExpertLayer:
    """A layer of the action expert as the operations are given it; nothing moves."""
    names = ("qkv", "out", "gate_up", "down")
    return dataclasses.replace(layer, **{name: getattr(layer, name).T for name in names})


def _tables(angles: Rotary) -> tuple[Float[Array, "B S half"], Float[Array, "B S half"]]:
    return angles.cos[:, :, 0], angles.sin[:, :, 0]


def _vision_block(
    block: VisionBlock,
    following: Norm,
    x: Float[Array, "B N D"],
    normed: Float[Array, "B N D"],
    num_heads: int,
    operations: ModuleType,
) -> tuple[Float[Array, "B N D"], Float[Array, "B N D"]]:
    """A block's output, and that through the norm of the block that follows; so are its inputs.

    Whoever reads a product adds its bias.
    """
    qkv = normed @ block.qkv.kernel
    attended = attend(*operations.split_bias(qkv, block.qkv.bias, num_heads))
    x, normed = _add_layer_norm(x, attended, block.out, block.mlp_norm, operations)
    activated = operations.gelu_bias(normed @ block.up.kernel, block.up.bias)
    return _add_layer_norm(x, activated, block.down, following, operations)


def _add_layer_norm(
    x: Float[Array, "B N D"],
    y: Float[Array, "B N inputs"],
    affine: Affine,
    norm: Norm,
    operations: ModuleType,
) -> tuple[Float[Array, "B N D"], Float[Array, "B N D"]]:
    """x + affine(y), and its layer norm."""
    product, bias = y @ affine.kernel, affine.bias
    vectors = (bias, norm.scale, norm.shift)
    return operations.add_layer_norm(x, product, *vectors, LAYER_NORM_EPSILON)


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
    assert norm.shift is not None
    return kernels_plain.layer_norm(x, norm.scale, norm.shift, LAYER_NORM_EPSILON)


def _attend(
    query: Float[Array, "B S K head_dim"],
    key: Float[Array, "B T G head_dim"],
    value: Float[Array, "B T G head_dim"],
    mask: Bool[Array, "B _ _"],
    operations: ModuleType,
) -> Float[Array, "B S K*head_dim"]:
    """Softmax attention of queries that are scaled already, to as many keys as the mask has."""
    if key.shape[2] == 1 and mask.shape[1] == 1:
        return operations.attend(query, key, value, mask[:, 0])
    keys = mask.shape[2]
    everyone = jnp.broadcast_to(mask, (len(mask), query.shape[1], keys))
    return attend(query, key[:, :keys], value[:, :keys], everyone)


def _encode(
    model: "Pi0",
    weights: Deployed,
    images: tuple[Array, ...],
    rest: Any,
    length: int,
    operations: ModuleType = kernels_plain,
) -> "tuple[Encoded, Any]":
    """`encode`, of what `_inputs_of` gives."""
    return encode(model, weights, *_unpacked(images, rest, length), operations)


def _embed(
    model: "Pi0",
    weights: Deployed,
    images: tuple[Array, ...],
    rest: Any,
    length: int,
    operations: ModuleType = kernels_plain,
) -> "Encoded":
    """`embed`, of what `_inputs_of` gives."""
    return embed(model, weights, *_unpacked(images, rest, length), operations)


def _unpacked(
    images: tuple[Array, ...], rest: Any, length: int
) -> tuple[Array, Array, Array, Array]:
    """Images, camera mask, prompt and prompt mask."""
    if isinstance(rest, tuple):
        *masks, prompt, prompt_mask = rest
        camera_mask = jnp.stack(masks, axis=1)
        prompt, prompt_mask = prompt[:, :length], prompt_mask[:, :length]
    else:
        camera_mask, prompt, prompt_mask = jnp.split(rest, [len(images), len(images) + length], 1)
        camera_mask, prompt_mask = camera_mask != 0, prompt_mask != 0
    return jnp.stack(images, axis=1), camera_mask, prompt, prompt_mask


def _sizes(encoded: "Encoded") -> tuple[int, ...]:
    """On which the shapes of a call depend."""
    return *encoded.patches.shape[:2], encoded.prompt.shape[1]


def _prefix_length(encoded: "Encoded", capacity: int | None) -> int:
    """Tokens of the prefix, padding counted."""
    cameras, patches = encoded.patches.shape[1:3]
    return (cameras * patches if capacity is None else capacity) + encoded.prompt.shape[1]


def _distance(found: Float[Array, "*shape"], expected: Float[Array, "*shape"]) -> float:
    """Norm of the difference, over the norm of what is expected; infinite for NaN."""
    wide_found, wide_expected = (np.asarray(x).astype(np.float64) for x in (found, expected))
    apart = np.linalg.norm(wide_found - wide_expected) / np.linalg.norm(wide_expected)
    return float(apart) if math.isfinite(apart) else math.inf
