"""A model's weights as inference reads them: what no observation changes is computed once.

- The kernels of one input are one kernel: q, k, v, and the MLP's gate and up.
- RoPE's queries are scaled by head_dim^-0.5 in their kernel: exact where that is a power of two, as
  it is in every released model.
- Adapters are merged with their kernels.
- The times of the denoising steps are known beforehand, and with them all that the adaptive norms
  are modulated by: a table, in the place of a condition and of 0.1 B parameters.
- The patch embedding's bias and the position embedding are one array.

Scales of norms stay where they are: multiplied into a bfloat16 kernel they would round it once
more, and the norm multiplies by them at no cost.

Dimension letters: N patches, D width, E width of the suffix, F MLP, K heads, G kv heads, L layers,
T denoising steps.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pruner_spec.flow import euler_step, euler_time_embeddings
from pruner_torch import gemma, siglip
from pruner_torch.layers import LayerNorm, Linear, constant, wide

if TYPE_CHECKING:
    from pruner_torch.pi0 import Pi0


@dataclasses.dataclass(frozen=True)
class Affine:
    """x · kernel + bias."""

    kernel: Float[Tensor, "inputs outputs"]
    bias: Float[Tensor, "*N outputs"] | None = None


@dataclasses.dataclass(frozen=True)
class Norm:
    """What a normalised x is multiplied by, and what is added: [D].

    RMS norms' are in `wide` precision. Layer norms' are as the model stores them, in PyTorch, whose
    kernel then reads and writes the model's dtype and computes in `wide` precision all the same.
    """

    scale: Float[Tensor, "D"]
    shift: Float[Tensor, "D"] | None = None


@dataclasses.dataclass(frozen=True)
class VisionBlock:
    """A block of the vision tower; `qkv` is [D, 3*D]."""

    attention_norm: Norm
    qkv: Affine
    out: Affine
    mlp_norm: Norm
    up: Affine
    down: Affine


@dataclasses.dataclass(frozen=True)
class Vision:
    """The vision tower; the bias of `patch_embedding` is [N, D], with the positions in it."""

    patch_embedding: Affine
    blocks: tuple[VisionBlock, ...]
    final_norm: Norm
    head: Affine


@dataclasses.dataclass(frozen=True)
class ExpertLayer:
    """An expert's part of a layer; its norms are None where a schedule has them.

    Attributes:
        qkv: [D, (K + 2*G) * head_dim], queries first, then keys, then values.
        out: [K * head_dim, D].
        gate_up: [D, 2*F], the gate first.
        down: [F, D].
    """

    attention_norm: Norm | None
    qkv: Float[Tensor, "D outputs"]
    out: Float[Tensor, "inputs D"]
    mlp_norm: Norm | None
    gate_up: Float[Tensor, "D 2*F"]
    down: Float[Tensor, "F D"]


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
    embedding: Float[Tensor, "V D"]
    language: tuple[ExpertLayer, ...]
    action: tuple[ExpertLayer, ...]
    final_norm: Norm | None
    action_in: Affine
    action_out: Affine
    state_in: Affine | None = None
    time_in: Affine | None = None
    time_out: Affine | None = None


@dataclasses.dataclass(frozen=True)
class Modulation:
    """What adaptive norms do at each of T times, in `wide` precision but for the gate.

    Attributes:
        scale: [T, L, E], with the one of "one plus scale"; [T, E] of a norm that stands alone.
        shift: the same.
        gate: the same, in the model's dtype.
    """

    scale: Float[Tensor, "T *L E"]
    shift: Float[Tensor, "T *L E"]
    gate: Float[Tensor, "T *L E"]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The denoising steps, as far as the observation has no part in them.

    Attributes:
        steps: T.
        step: dt, negative.
        attention, mlp, final: π0.5's norms; None in π0.
        time: [T, E], what the time adds before π0's activation; None in π0.5.
    """

    steps: int
    step: float
    attention: Modulation | None = None
    mlp: Modulation | None = None
    final: Modulation | None = None
    time: Float[Tensor, "T E"] | None = None


@torch.no_grad()
def deploy(model: "Pi0") -> Deployed:
    """The weights of a model; those that nothing is done to are the model's own arrays."""
    dtype, config = model.dtype, model.config
    high = wide(dtype)
    pi0: dict[str, Affine] = {}
    if not config.pi05:
        width = config.action_expert.width
        pi0 = {
            "state_in": _affine(model.state_proj, high),
            "time_in": Affine(model.action_time_mlp_in.kernel[:width].to(high)),
            "time_out": _affine(model.action_time_mlp_out, high),
        }
    return Deployed(
        vision=_vision(model.vision, dtype),
        embedding=model.gemma.embedder.embedding,
        language=_layers(model.gemma.language, dtype),
        action=_layers(model.gemma.action, dtype),
        final_norm=_rms_norm(model.gemma.action.final_norm, dtype),
        action_in=_affine(model.action_in_proj, high),
        action_out=_affine(model.action_out_proj, high),
        **pi0,
    )


@torch.no_grad()
def clock_of(model: "Pi0") -> Clock:
    """What a model's `Schedule`s are made of."""
    dtype = wide(model.dtype)
    if not model.config.pi05:
        both = _affine(model.action_time_mlp_in, dtype)
        return Clock(Affine(both.kernel[model.config.action_expert.width :], both.bias))
    expert: Any = model.gemma.action  # with adaptive norms
    attention, mlp = (
        tuple(_affine(getattr(layer, name).modulation, dtype) for layer in expert.layers)
        for name in ("attention_norm", "mlp_norm")
    )
    return Clock(
        first=_affine(model.time_mlp_in, dtype),
        second=_affine(model.time_mlp_out, dtype),
        attention=attention,
        mlp=mlp,
        final=_affine(expert.final_norm.modulation, dtype),
    )


@torch.no_grad()
def schedule(clock: Clock, num_steps: int, dtype: torch.dtype) -> Schedule:
    """The denoising steps, computed as the model's own norms compute them.

    Args:
        clock: of the model.
        num_steps: T.
        dtype: the model's.
    """
    kernel, step = clock.first.kernel, float(euler_step(num_steps))
    times = constant(euler_time_embeddings, (num_steps, len(kernel)), kernel.dtype, kernel.device)
    read = _apply(times, clock.first)
    if clock.second is None or clock.final is None:
        return Schedule(num_steps, step, time=read)
    condition = F.silu(_apply(F.silu(read), clock.second))
    attention, mlp = (
        torch.stack([_apply(condition, layer) for layer in layers], dim=1)
        for layers in (clock.attention, clock.mlp)
    )
    return Schedule(
        num_steps,
        step,
        attention=_modulation(attention, dtype),
        mlp=_modulation(mlp, dtype),
        final=_modulation(_apply(condition, clock.final), dtype),
    )


def _apply(x: Float[Tensor, "T inputs"], affine: Affine) -> Float[Tensor, "T outputs"]:
    return F.linear(x, affine.kernel.T, affine.bias)


def _modulation(values: Float[Tensor, "T *L 3*E"], dtype: torch.dtype) -> Modulation:
    scale, shift, gate = values.chunk(3, dim=-1)
    return Modulation((1 + scale).contiguous(), shift.contiguous(), gate.to(dtype).contiguous())


def _vision(tower: siglip.SigLip, dtype: torch.dtype) -> Vision:
    patches = _affine(tower.patch_embedding, wide(dtype))
    assert patches.bias is not None
    positions = tower.position_embedding.to(wide(dtype))
    return Vision(
        patch_embedding=Affine(patches.kernel, patches.bias + positions),
        blocks=tuple(_vision_block(block, dtype) for block in tower.blocks),
        final_norm=_layer_norm(tower.final_norm, dtype),
        head=_affine(tower.head, dtype),
    )


def _vision_block(block: Any, dtype: torch.dtype) -> VisionBlock:
    attention = block.attention
    parts = [_affine(part, dtype) for part in (attention.query, attention.key, attention.value)]
    return VisionBlock(
        attention_norm=_layer_norm(block.attention_norm, dtype),
        qkv=Affine(
            torch.cat([part.kernel for part in parts], dim=-1),
            torch.cat([part.bias for part in parts if part.bias is not None], dim=-1),
        ),
        out=_affine(attention.out, dtype),
        mlp_norm=_layer_norm(block.mlp_norm, dtype),
        up=_affine(block.mlp.up, dtype),
        down=_affine(block.mlp.down, dtype),
    )


def _layers(expert: gemma.Expert, dtype: torch.dtype) -> tuple[ExpertLayer, ...]:
    return tuple(_layer(layer, dtype) for layer in expert.layers)


def _layer(layer: Any, dtype: torch.dtype) -> ExpertLayer:
    attention, mlp = layer.attention, layer.mlp
    query = _merged(attention.query, dtype) * attention.head_dim**-0.5
    return ExpertLayer(
        attention_norm=_rms_norm(layer.attention_norm, dtype),
        qkv=torch.cat([query, _merged(attention.key, dtype), _merged(attention.value, dtype)], -1),
        out=_merged(attention.out, dtype),
        mlp_norm=_rms_norm(layer.mlp_norm, dtype),
        gate_up=torch.cat([_merged(mlp.gate, dtype), _merged(mlp.up, dtype)], dim=-1),
        down=_merged(mlp.down, dtype),
    )


def _merged(linear: Linear, dtype: torch.dtype) -> Float[Tensor, "inputs outputs"]:
    """A kernel with its adapter, which is a map of its input too: added in `wide` precision."""
    if linear.lora is None:
        return linear.kernel.to(dtype)
    every_input = torch.eye(len(linear.kernel), dtype=wide(dtype), device=linear.kernel.device)
    return (linear.kernel + linear.lora(every_input)).to(dtype)


def _affine(linear: Linear, dtype: torch.dtype) -> Affine:
    return Affine(linear.kernel.to(dtype), None if linear.bias is None else linear.bias.to(dtype))


def _layer_norm(norm: LayerNorm, dtype: torch.dtype) -> Norm:
    return Norm(norm.scale.to(dtype), norm.bias.to(dtype))


def _rms_norm(norm: Any, dtype: torch.dtype) -> Norm | None:
    """None of an adaptive norm, which the schedule has."""
    if isinstance(norm, gemma.AdaptiveRMSNorm):
        return None
    return Norm(1 + norm.scale.to(wide(dtype)))
