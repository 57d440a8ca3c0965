"""A model's weights as inference reads them: what no observation changes is computed once.

- The kernels of one input are one kernel: q, k, v, and the MLP's gate and up.
- RoPE's queries are scaled by head_dim^-0.5 in their kernel: exact where that is a power of two, as
  it is in every released model.
- Adapters are merged with their kernels.
- The times of the denoising steps are known beforehand, and with them all that the adaptive norms
  are modulated by: a table, in the place of a condition and of 0.1 B parameters. A norm's shift
  comes multiplied with the kernel that reads it.
- The patch embedding's bias and the position embedding are one array.
- The action expert's kernels lie in memory outputs first, as products of few rows read them.
- Layers come apart: a loop over stacked ones would slice each kernel out before it multiplies.

Scales of norms stay where they are: multiplied into a bfloat16 kernel they would round it once
more, and whoever writes a norm's input multiplies by them at no cost.

Dimension letters: N patches, D width, E width of the suffix, F MLP, K heads, G kv heads, L layers,
T denoising steps.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pruner_jax import gemma, siglip
from pruner_jax.float8 import quantize
from pruner_jax.layers import LayerNorm, Linear, constant, wide
from pruner_spec.flow import euler_step, euler_time_embeddings

if TYPE_CHECKING:
    from pruner_jax.pi0 import Pi0


Part = TypeVar("Part")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Affine:
    """x · kernel + bias."""

    kernel: Float[Array, "inputs outputs"]
    bias: Float[Array, "*N outputs"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Norm:
    """What a normalised x is multiplied by, and what is added: [D].

    RMS norms' are in `wide` precision, a schedule's [T, E]. Layer norms' are as the model stores
    them, in PyTorch, whose kernel then reads and writes the model's dtype and computes in `wide`
    precision all the same.
    """

    scale: Float[Array, "D"]
    shift: Float[Array, "D"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisionBlock:
    """A block of the vision tower; `qkv` is [D, 3*D]."""

    attention_norm: Norm
    qkv: Affine
    out: Affine
    mlp_norm: Norm
    up: Affine
    down: Affine


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Vision:
    """The vision tower; the bias of `patch_embedding` is [N, D], with the positions in it."""

    patch_embedding: Affine
    blocks: tuple[VisionBlock, ...]
    final_norm: Norm
    head: Affine


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertLayer:
    """An expert's part of a layer; each kernel of the action expert's is transposed.

    Attributes:
        attention_scale, mlp_scale: of the norms, in `wide` precision, with the one of "one plus
            scale" in them; None where a schedule has them.
        qkv: [D, (K + 2*G) * head_dim], queries first, then keys, then values.
        out: [K * head_dim, D].
        gate_up: [D, 2*F], the gate first.
        down: [F, D]. Of the language model both may be `Quantized`.
    """

    attention_scale: Float[Array, "D"] | None
    qkv: Float[Array, "D outputs"]
    out: Float[Array, "inputs D"]
    mlp_scale: Float[Array, "D"] | None
    gate_up: Float[Array, "D 2*F"]
    down: Float[Array, "F D"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clock:
    """What the time of a denoising step goes through, in `wide` precision.

    Attributes:
        first: π0.5's first map of the time embedding; in π0 the part of the kernel that reads it.
        second: π0.5's second one; None in π0, and so are the others.
        attention, mlp: of the adaptive norms, a layer each: [E, 3*E].
        final: of the final norm.
    """

    first: Affine
    second: Affine | None = None
    attention: tuple[Affine, ...] = ()
    mlp: tuple[Affine, ...] = ()
    final: Affine | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Deployed:
    """All weights of a model.

    Attributes:
        vision: the tower.
        embedding: [vocabulary, D], as it is in the model.
        language: a layer each; of the last one inference needs keys and values alone.
        action: a layer each.
        final_norm: of the action expert; None where a schedule has it.
        action_in, action_out: in `wide` precision.
        state_in, time_in, time_out: π0's, in `wide` precision; `time_in` is the part of the
            kernel that reads actions, without a bias.
    """

    vision: Vision
    embedding: Float[Array, "V D"]
    language: tuple[ExpertLayer, ...]
    action: tuple[ExpertLayer, ...]
    final_norm: Norm | None
    action_in: Affine
    action_out: Affine
    state_in: Affine | None = None
    time_in: Affine | None = None
    time_out: Affine | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Modulation:
    """What an adaptive norm does at each of T times, in `wide` precision but for the gate.

    Attributes:
        scale: with the one of "one plus scale".
        added: the shift times the kernel that reads the norm's result: N outputs.
        gate: of the residual, in the model's dtype.
    """

    scale: Float[Array, "T E"]
    added: Float[Array, "T N"]
    gate: Float[Array, "T E"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["attention", "mlp", "final", "time"],
    meta_fields=["steps", "step"],
)
@dataclasses.dataclass(frozen=True)
class Schedule:
    """The denoising steps, as far as the observation has no part in them.

    Attributes:
        steps: T.
        step: dt, negative.
        attention, mlp: π0.5's norms, a layer each; none in π0.
        final: π0.5's final norm, [T, E]; None in π0.
        time: [T, E], what the time adds before π0's activation; None in π0.5.
    """

    steps: int
    step: float
    attention: tuple[Modulation, ...] = ()
    mlp: tuple[Modulation, ...] = ()
    final: Norm | None = None
    time: Float[Array, "T E"] | None = None


def deploy(model: "Pi0", float8: bool = False) -> Deployed:
    """The weights of a model; those that nothing is done to are the model's own arrays.

    Args:
        model: whose weights these are.
        float8: whether the kernels of the language model's MLPs are `Quantized`.
    """
    dtype, config = model.dtype, model.config
    high = wide(dtype)
    final_scale = _rms_scale(model.gemma.action.final_norm, dtype)
    pi0: dict[str, Affine] = {}
    if not config.pi05:
        width = config.action_expert.width
        pi0 = {
            "state_in": _affine(model.state_proj, high),
            "time_in": Affine(model.action_time_mlp_in.kernel[...][:width].astype(high)),
            "time_out": _affine(model.action_time_mlp_out, high),
        }
    return Deployed(
        vision=_vision(model.vision, dtype),
        embedding=model.gemma.embedder.embedding[...],
        language=_of_each(model.gemma.language.layers, lambda layer: _layer(layer, dtype, float8)),
        action=_of_each(
            model.gemma.action.layers, lambda layer: _outputs_first(_layer(layer, dtype))
        ),
        final_norm=None if final_scale is None else Norm(final_scale),
        action_in=_affine(model.action_in_proj, high),
        action_out=_affine(model.action_out_proj, high),
        **pi0,
    )


def clock_of(model: "Pi0") -> Clock:
    """What a model's `Schedule`s are made of."""
    dtype = wide(model.dtype)
    if not model.config.pi05:
        both = _affine(model.action_time_mlp_in, dtype)
        return Clock(Affine(both.kernel[model.config.action_expert.width :], both.bias))
    expert: Any = model.gemma.action  # with adaptive norms
    attention, mlp = (
        _of_each(expert.layers, lambda layer, name=name: _modulation_of(layer, name, dtype))
        for name in ("attention_norm", "mlp_norm")
    )
    return Clock(
        first=_affine(model.time_mlp_in, dtype),
        second=_affine(model.time_mlp_out, dtype),
        attention=attention,
        mlp=mlp,
        final=_affine(expert.final_norm.modulation, dtype),
    )


def schedule(
    clock: Clock, layers: tuple[ExpertLayer, ...], num_steps: int, dtype: jnp.dtype
) -> Schedule:
    """The denoising steps, computed as the model's own norms compute them.

    Args:
        clock: of the model.
        layers: of the action expert.
        num_steps: T.
        dtype: the model's.
    """
    kernel, step = clock.first.kernel, float(euler_step(num_steps))
    times = constant(euler_time_embeddings, (num_steps, len(kernel)), kernel.dtype)
    read = _apply(times, clock.first)
    if clock.second is None or clock.final is None:
        return Schedule(num_steps, step, time=read)
    condition = jax.nn.silu(_apply(jax.nn.silu(read), clock.second))
    scale, shift, _ = jnp.split(_apply(condition, clock.final), 3, axis=-1)

    def modulations(norms: tuple[Affine, ...], name: str) -> tuple[Modulation, ...]:
        readers = (getattr(layer, name) for layer in layers)
        return tuple(
            _modulation(condition, norm, reader, dtype)
            for norm, reader in zip(norms, readers, strict=True)
        )

    return Schedule(
        num_steps,
        step,
        attention=modulations(clock.attention, "qkv"),
        mlp=modulations(clock.mlp, "gate_up"),
        final=Norm(1 + scale, shift),
    )


def _apply(x: Float[Array, "T inputs"], affine: Affine) -> Float[Array, "T outputs"]:
    """In full precision: computed once, used in every call."""
    y = jnp.matmul(x, affine.kernel, precision="highest")
    return y if affine.bias is None else y + affine.bias


@functools.partial(jax.jit, static_argnums=3)
def _modulation(
    condition: Float[Array, "T E"], norm: Affine, reader: Float[Array, "N E"], dtype: jnp.dtype
) -> Modulation:
    """Of a norm, and of the kernel that reads it, transposed."""
    scale, shift, gate = jnp.split(_apply(condition, norm), 3, axis=-1)
    added = jnp.matmul(shift, reader.T.astype(shift.dtype), precision="highest")
    return Modulation(1 + scale, added, gate.astype(dtype))


def _vision(tower: siglip.SigLip, dtype: jnp.dtype) -> Vision:
    patches = _affine(tower.patch_embedding, wide(dtype))
    assert patches.bias is not None
    positions = tower.position_embedding[...].astype(wide(dtype))
    return Vision(
        patch_embedding=Affine(patches.kernel, patches.bias + positions),
        blocks=_of_each(tower.blocks, lambda block: _vision_block(block, dtype)),
        final_norm=_layer_norm(tower.final_norm, dtype),
        head=_affine(tower.head, dtype),
    )


def _vision_block(block: Any, dtype: jnp.dtype) -> VisionBlock:
    attention = block.attention
    parts = [_affine(part, dtype) for part in (attention.query, attention.key, attention.value)]
    return VisionBlock(
        attention_norm=_layer_norm(block.attention_norm, dtype),
        qkv=Affine(
            jnp.concatenate([part.kernel for part in parts], axis=-1),
            jnp.concatenate([part.bias for part in parts if part.bias is not None], axis=-1),
        ),
        out=_affine(attention.out, dtype),
        mlp_norm=_layer_norm(block.mlp_norm, dtype),
        up=_affine(block.mlp.up, dtype),
        down=_affine(block.mlp.down, dtype),
    )


def _of_each(layers: nnx.Module, function: Callable[[Any], Part]) -> tuple[Part, ...]:
    """A function of each layer that `layers.stack` put together, compiled once for all of them."""
    graph, state = nnx.split(layers)

    @jax.jit
    def of_layer(state: nnx.State, place: int) -> Part:
        return function(nnx.merge(graph, jax.tree.map(lambda leaf: leaf[place], state)))

    return tuple(of_layer(state, place) for place in range(len(jax.tree.leaves(state)[0])))


def _modulation_of(layer: Any, name: str, dtype: jnp.dtype) -> Affine:
    return _affine(getattr(layer, name).modulation, dtype)


def _layer(layer: Any, dtype: jnp.dtype, float8: bool = False) -> ExpertLayer:
    attention, mlp = layer.attention, layer.mlp
    parts = [_merged(part, dtype) for part in (attention.query, attention.key, attention.value)]
    parts[0] = parts[0] * attention.head_dim**-0.5
    found = ExpertLayer(
        attention_scale=_rms_scale(layer.attention_norm, dtype),
        qkv=jnp.concatenate(parts, axis=-1),
        out=_merged(attention.out, dtype),
        mlp_scale=_rms_scale(layer.mlp_norm, dtype),
        gate_up=jnp.concatenate([_merged(mlp.gate, dtype), _merged(mlp.up, dtype)], axis=-1),
        down=_merged(mlp.down, dtype),
    )
    return _mlp_in_float8(found) if float8 else found


def _mlp_in_float8(layer: ExpertLayer) -> ExpertLayer:
    kernels: dict[str, Any] = {name: quantize(getattr(layer, name)) for name in ("gate_up", "down")}
    return dataclasses.replace(layer, **kernels)


def _merged(linear: Linear, dtype: jnp.dtype) -> Float[Array, "inputs outputs"]:
    """A kernel with its adapter, which is a map of its input too: added in `wide` precision."""
    kernel = linear.kernel[...]
    if linear.lora is None:
        return kernel.astype(dtype)
    with jax.default_matmul_precision("highest"):
        added = linear.lora(jnp.eye(len(kernel), dtype=wide(dtype)))
    return (kernel + added).astype(dtype)


def _affine(linear: Linear, dtype: jnp.dtype) -> Affine:
    bias = None if linear.bias is None else linear.bias[...].astype(dtype)
    return Affine(linear.kernel[...].astype(dtype), bias)


def _layer_norm(norm: LayerNorm, dtype: jnp.dtype) -> Norm:
    return Norm(norm.scale[...].astype(wide(dtype)), norm.bias[...].astype(wide(dtype)))


def _rms_scale(norm: Any, dtype: jnp.dtype) -> Float[Array, "D"] | None:
    """None of an adaptive norm, which the schedule has."""
    if isinstance(norm, gemma.AdaptiveRMSNorm):
        return None
    return 1 + norm.scale[...].astype(wide(dtype))


def _outputs_first(layer: ExpertLayer) -> ExpertLayer:
    """The same layer, its kernels transposed."""
    names = ("qkv", "out", "gate_up", "down")
    return dataclasses.replace(layer, **{name: getattr(layer, name).T for name in names})
