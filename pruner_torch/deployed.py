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

Scales of norms stay where they are: multiplied into a bfloat16 kernel they would round it once
more, and whoever writes a norm's input multiplies by them at no cost.

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
from pruner_torch.float8 import quantize
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

    RMS norms' are in `wide` precision, a schedule's [T, E]. Layer norms' are as the model stores
    them, in PyTorch, whose kernel then reads and writes the model's dtype and computes in `wide`
    precision all the same.
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
    """An expert's part of a layer.

    Attributes:
        attention_scale, mlp_scale: of the norms, in `wide` precision, with the one of "one plus
            scale" in them; None where a schedule has them.
        qkv: [D, (K + 2*G) * head_dim], queries first, then keys, then values.
        out: [K * head_dim, D].
        gate_up: [D, 2*F], the gate first.
        down: [F, D]. Of the language model both may be `Quantized`.
    """

    attention_scale: Float[Tensor, "D"] | None
    qkv: Float[Tensor, "D outputs"]
    out: Float[Tensor, "inputs D"]
    mlp_scale: Float[Tensor, "D"] | None
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
    """What an adaptive norm does at each of T times, in `wide` precision but for the gate.

    Attributes:
        scale: with the one of "one plus scale".
        added: the shift times the kernel that reads the norm's result: N outputs.
        gate: of the residual, in the model's dtype.
    """

    scale: Float[Tensor, "T E"]
    added: Float[Tensor, "T N"]
    gate: Float[Tensor, "T E"]


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
    time: Float[Tensor, "T E"] | None = None


@torch.no_grad()
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
            "time_in": Affine(model.action_time_mlp_in.kernel[:width].to(high)),
            "time_out": _affine(model.action_time_mlp_out, high),
        }
    return Deployed(
        vision=_vision(model.vision, dtype),
        embedding=model.gemma.embedder.embedding,
        language=_layers(model.gemma.language, dtype, float8),
        action=tuple(_outputs_first(layer) for layer in _layers(model.gemma.action, dtype)),
        final_norm=None if final_scale is None else Norm(final_scale),
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
def schedule(
    clock: Clock, layers: tuple[ExpertLayer, ...], num_steps: int, dtype: torch.dtype
) -> Schedule:
    """The denoising steps, computed as the model's own norms compute them.

    Args:
        clock: of the model.
        layers: of the action expert.
        num_steps: T.
        dtype: the model's.
    """
    kernel, step = clock.first.kernel, float(euler_step(num_steps))
    times = constant(euler_time_embeddings, (num_steps, len(kernel)), kernel.dtype, kernel.device)
    read = _apply(times, clock.first)
    if clock.second is None or clock.final is None:
        return Schedule(num_steps, step, time=read)
    condition = F.silu(_apply(F.silu(read), clock.second))
    scale, shift, _ = _apply(condition, clock.final).chunk(3, dim=-1)
    return Schedule(
        num_steps,
        step,
        attention=_modulations(condition, clock.attention, [each.qkv for each in layers], dtype),
        mlp=_modulations(condition, clock.mlp, [each.gate_up for each in layers], dtype),
        final=Norm(1 + scale, shift.contiguous()),
    )


def _apply(x: Float[Tensor, "T inputs"], affine: Affine) -> Float[Tensor, "T outputs"]:
    return F.linear(x, affine.kernel.T, affine.bias)


def _modulations(
    condition: Float[Tensor, "T E"],
    norms: tuple[Affine, ...],
    readers: list[Float[Tensor, "E N"]],
    dtype: torch.dtype,
) -> tuple[Modulation, ...]:
    """Of the norms of all layers, each before the kernel that reads it."""
    found = []
    for norm, reader in zip(norms, readers, strict=True):
        scale, shift, gate = _apply(condition, norm).chunk(3, dim=-1)
        added = shift @ reader.to(shift.dtype)
        found.append(Modulation(1 + scale, added, gate.to(dtype).contiguous()))
    return tuple(found)


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


def _layers(
    expert: gemma.Expert, dtype: torch.dtype, float8: bool = False
) -> tuple[ExpertLayer, ...]:
    return tuple(_layer(layer, dtype, float8) for layer in expert.layers)


def _layer(layer: Any, dtype: torch.dtype, float8: bool) -> ExpertLayer:
    attention, mlp = layer.attention, layer.mlp
    query = _merged(attention.query, dtype) * attention.head_dim**-0.5
    found = ExpertLayer(
        attention_scale=_rms_scale(layer.attention_norm, dtype),
        qkv=torch.cat([query, _merged(attention.key, dtype), _merged(attention.value, dtype)], -1),
        out=_merged(attention.out, dtype),
        mlp_scale=_rms_scale(layer.mlp_norm, dtype),
        gate_up=torch.cat([_merged(mlp.gate, dtype), _merged(mlp.up, dtype)], dim=-1),
        down=_merged(mlp.down, dtype),
    )
    return _mlp_in_float8(found) if float8 else found


def _mlp_in_float8(layer: ExpertLayer) -> ExpertLayer:
    kernels: dict[str, Any] = {name: quantize(getattr(layer, name)) for name in ("gate_up", "down")}
    return dataclasses.replace(layer, **kernels)


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


def _rms_scale(norm: Any, dtype: torch.dtype) -> Float[Tensor, "D"] | None:
    """None of an adaptive norm, which the schedule has."""
    if isinstance(norm, gemma.AdaptiveRMSNorm):
        return None
    return 1 + norm.scale.to(wide(dtype))


def _outputs_first(layer: ExpertLayer) -> ExpertLayer:
    """The same layer, its kernels transposed in memory."""
    names = ("qkv", "out", "gate_up", "down")
    return dataclasses.replace(
        layer, **{name: getattr(layer, name).T.contiguous().T for name in names}
    )
