"""What the fast way computes, over `Deployed` weights: from an observation to actions.

What `sampling` computes, but for rounding. No layer is asked for what nobody reads (the last one of
the prefix gives keys and values alone), keys and values are written where the denoising steps read
them, and what every call would compute again is looked up. Small products and attention go through
`operations`: `kernels`, Triton's on a GPU, or `kernels_plain`; or, of π0.5's denoising steps on
Hopper, a `Chain`.

Dimension letters: B batch, C cameras, N patches, L prompt tokens, S prefix, H suffix, T = S + H,
D width, E width of the suffix, K heads, G kv heads, A action dim.
"""

import dataclasses
import functools
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pruner_jax import kernels_plain, sampling
from pruner_jax.chain import Chain
from pruner_jax.deployed import Affine, Deployed, ExpertLayer, Schedule
from pruner_jax.forward_vision import apply_affine, see
from pruner_jax.gemma import Rotary, rotary
from pruner_jax.kernels import Rows
from pruner_jax.layers import attend
from pruner_jax.pruner import Selection
from pruner_jax.tables import TableRow, value_of
from pruner_kernels import few_rows

if TYPE_CHECKING:
    from pruner_jax.pi0 import Encoded, Pi0, Prefix


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
    return encoded, model.select(encoded, operations)


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
    graphs: bool = True,
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
        graphs: whether what is launched by a `Chain` is captured.
    """
    prefix = sampling.prune(model, encoded, selection, capacity, operations)
    cache = prefill(model, weights, prefix, operations)
    return denoise(model, weights, schedule, cache, state, noise, operations, graphs)


def prefill(
    model: "Pi0", weights: Deployed, prefix: "Prefix", operations: ModuleType = kernels_plain
) -> Cache:
    """Keys and values of the prefix."""
    config, head_dim = model.config, model.config.paligemma.head_dim
    batch, length = prefix.valid.shape
    angles = rotary(prefix.positions, head_dim, model.dtype)
    room = (batch, length + config.suffix_length, config.paligemma.num_kv_heads, head_dim)
    # Behind the prefix's the suffix writes all keys, before anyone reads them.
    empty = jax.ShapeDtypeStruct(room, model.dtype)
    norms = [_own_norms(layer) for layer in weights.language]
    first, *following = (each.attention_scale for each in norms)
    rows = operations.scale_rows(prefix.tokens.reshape(batch * length, -1), first)
    written = []
    for layer, here, scale in zip(weights.language, norms, following, strict=False):
        rows, *both = _prefix_layer(
            layer, here, scale, rows, angles, prefix.valid, empty, operations
        )
        written.append(both)
    written.append(_project_keys(weights.language[-1], rows, angles, empty, operations))
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
    graphs: bool = True,
) -> Float[Array, "B H A"]:
    """Euler steps from the noise at time 1 to the actions at time 0.

    Args:
        model, weights, schedule, state, noise, operations, graphs: see `act`.
        cache: of the prefix.
    """
    place = cache.valid.shape[1]
    token = None if weights.state_in is None else apply_affine(state, weights.state_in)[:, None]
    given = _Given(
        weights=dataclasses.replace(
            weights, action_in=_apart(weights.action_in), action_out=_apart(weights.action_out)
        ),
        schedule=schedule,
        turns=_tables(cache.suffix),
        mask=_suffix_mask(model, cache.valid),
        token=token,
    )
    if not _has_chain(given, cache, noise, operations):
        advance = functools.partial(_advance, model, given, place, operations)
        steps = jnp.arange(schedule.steps, dtype=jnp.int32)
        (x, _, _), _ = jax.lax.scan(advance, (noise, cache.key, cache.value), steps)
        return x
    chain: Any = Chain(graphs)  # in the place of `kernels`
    given, past = chain.read(given), chain.written((cache.key, cache.value))
    carry = chain.copied(noise), *past
    steps: Any = range(schedule.steps)
    for step in steps:
        carry, _ = _advance(model, given, place, chain, carry, step)
    return chain.run(carry[0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Given:
    """What all denoising steps read.

    Attributes:
        weights: whose maps of actions have biases of their own.
        schedule: the steps.
        turns: cosines and sines of the suffix.
        mask: see `_suffix_mask`.
        token: π0's of the state.
    """

    weights: Deployed
    schedule: Schedule
    turns: tuple[Float[Array, "B H half"], Float[Array, "B H half"]]
    mask: Bool[Array, "B *_ T"]
    token: Float[Array, "B 1 E"] | None


def _has_chain(given: _Given, cache: Cache, noise: Array, operations: ModuleType) -> bool:
    """Whether the steps are launched by one call: those of π0.5, of sizes that have kernels."""
    (batch, horizon, actions), (*_, head_dim) = noise.shape, cache.key[0].shape
    return (
        bool(given.schedule.attention)
        and few_rows.attends(given.mask.shape[-1], head_dim)
        and operations.packs(batch * horizon, given.weights.action[0], head_dim, actions)
    )


def _advance(
    model: "Pi0",
    given: _Given,
    place: int,
    operations: ModuleType,
    carry: "_Carry",
    step: Int[Array, ""],
) -> "tuple[_Carry, None]":
    """A step; the suffix's first token has this place. Over a `Chain` arrays are `Buffer`s."""
    x, keys, values = carry
    weights, schedule = given.weights, given.schedule
    norms = _norms(weights, schedule, step)
    scale, shift = _final_norm(weights, schedule, step)
    first, *following = (*(each.attention_scale for each in norms), scale)
    rows = _suffix_rows(model, weights, schedule, step, x, given.token, first, operations)
    written = []
    for i, layer in enumerate(weights.action):
        past = keys[i], values[i]
        rows, *both = _suffix_layer(
            layer, norms[i], following[i], rows, given.turns, given.mask, past, place, operations
        )
        written.append(both)
    out = weights.action_out
    x = operations.euler_step(rows, scale, shift, out.kernel, out.bias, x, schedule.step)
    keys, values = zip(*written, strict=True)
    return (x, keys, values), None


# Actions, and the keys and values of all layers, whose last H a step writes anew.
_Carry = tuple[Float[Array, "B H A"], tuple[Array, ...], tuple[Array, ...]]
_Vector = Float[Array, "N"] | TableRow


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
            *(
                TableRow(table, step)
                for table in (attention.scale, attention.added, attention.gate)
            ),
            *(TableRow(table, step) for table in (mlp.scale, mlp.added, mlp.gate)),
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
    return TableRow(schedule.final.scale, step), TableRow(schedule.final.shift, step)


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
        kernel, bias = action_in.kernel, action_in.bias
        return operations.embed_actions(x, kernel, bias, scale, model.dtype)
    assert token is not None
    tokens = apply_affine(apply_affine(x, action_in), weights.time_in) + schedule.time[step]
    tokens = jnp.concatenate([token, apply_affine(jax.nn.silu(tokens), weights.time_out)], axis=1)
    tokens = tokens.reshape(-1, tokens.shape[-1])
    return operations.scale_rows(tokens.astype(model.dtype), scale)


def _prefix_layer(
    layer: ExpertLayer,
    norms: _Norms,
    following: _Vector,
    rows: Rows,
    angles: Rotary,
    valid: Bool[Array, "B S"],
    empty: jax.ShapeDtypeStruct,
    operations: ModuleType,
) -> tuple[Rows, Float[Array, "B T G head_dim"], Float[Array, "B T G head_dim"]]:
    """A layer of the language model; its keys and values are the first of two like `empty`.

    A library multiplies many rows best. Nobody reads what padding attends to, so that a mask of
    keys is enough.
    """
    heads = len(layer.out) // empty.shape[-1]
    qkv = operations.product(rows.scaled, layer.qkv)
    query, key, value = operations.rotate(qkv, rows, None, *_tables(angles), empty, empty, 0, heads)
    attended = _attend(query, key, value, valid, operations).reshape(len(rows.x), -1)
    out = operations.product(attended, layer.out)
    rows = operations.add_scaled(rows.x, out, None, norms.mlp_scale)
    gated = operations.gelu_product(operations.product(rows.scaled, layer.gate_up), rows, None)
    down = operations.product(gated, layer.down)
    return operations.add_scaled(rows.x, down, None, following), key, value


def _suffix_layer(
    layer: ExpertLayer,
    norms: _Norms,
    following: _Vector,
    rows: Rows,
    turns: tuple[Float[Array, "B H half"], Float[Array, "B H half"]],
    mask: Bool[Array, "B *_ T"],
    past: tuple[Float[Array, "B T G head_dim"], Float[Array, "B T G head_dim"]],
    place: int,
    operations: ModuleType,
) -> tuple[Rows, Float[Array, "B T G head_dim"], Float[Array, "B T G head_dim"]]:
    """A layer of the action expert; its keys and values are those in `past` from `place` on."""
    layer = _inputs_first(layer)
    heads = len(layer.out) // past[0].shape[-1]
    query, key, value = operations.project(
        rows, layer.qkv, norms.attention_added, *turns, *past, place, heads
    )
    attended = _attend(query, key, value, mask, operations).reshape(len(rows.x), -1)
    rows = operations.merge(attended, layer.out, rows.x, norms.attention_gate, norms.mlp_scale)
    gated = operations.gated(rows, layer.gate_up, norms.mlp_added)
    rows = operations.merge(gated, layer.down, rows.x, norms.mlp_gate, following)
    return rows, key, value


def _project_keys(
    layer: ExpertLayer,
    rows: Rows,
    angles: Rotary,
    empty: jax.ShapeDtypeStruct,
    operations: ModuleType,
) -> tuple[Float[Array, "B T G head_dim"], Float[Array, "B T G head_dim"]]:
    """Of the last layer of the prefix nobody reads more than keys and values."""
    outputs = 2 * empty.shape[2] * empty.shape[3]
    qkv = operations.product(rows.scaled, layer.qkv[:, -outputs:])
    return operations.rotate(qkv, rows, None, *_tables(angles), empty, empty, 0, 0)[1:]


def _inputs_first(layer: ExpertLayer) -> ExpertLayer:
    """A layer of the action expert as the operations are given it; nothing moves."""
    names = ("qkv", "out", "gate_up", "down")
    return dataclasses.replace(layer, **{name: getattr(layer, name).T for name in names})


def _tables(angles: Rotary) -> tuple[Float[Array, "B S half"], Float[Array, "B S half"]]:
    return angles.cos[:, :, 0], angles.sin[:, :, 0]


def _suffix_mask(model: "Pi0", valid: Bool[Array, "B S"]) -> Bool[Array, "B *_ T"]:
    """Who of the suffix may attend to whom, [B, H, T]; [B, T] where all see the same."""
    batch, length = valid.shape
    size = model.config.suffix_length
    before = jnp.concatenate([valid, jnp.ones((batch, size), bool)], axis=1)
    if model.config.pi05:
        return before
    place = jnp.arange(length + size)
    sees = place <= jnp.where(place[length:, None] == length, length, length + size)
    return before[:, None] & sees


def _attend(
    query: Float[Array, "B S K head_dim"],
    key: Float[Array, "B T G head_dim"],
    value: Float[Array, "B T G head_dim"],
    mask: Bool[Array, "B *_ T"],
    operations: ModuleType,
) -> Float[Array, "B S K*head_dim"]:
    """Softmax attention of queries that are scaled already, to as many keys as the mask has."""
    if key.shape[2] == 1 and len(mask.shape) == 2:
        return operations.attend(query, key, value, mask)
    keys, rows = mask.shape[-1], mask if len(mask.shape) == 3 else mask[:, None]
    everyone = jnp.broadcast_to(rows, (len(mask), query.shape[1], keys))
    return attend(query, key[:, :keys], value[:, :keys], everyone)


def _apart(affine: Affine) -> Affine:
    """With a bias that is no row of a table."""
    assert affine.bias is not None
    return Affine(affine.kernel, value_of(affine.bias))
