"""Training over several devices, a process each: who holds what.

Every process computes its share of the batch. Weights, moments and average are split over the
mesh's axis "fsdp" (FSDP2) and repeated over "data"; where they are not split, DDP sums up the
gradients.
"""

import dataclasses
import warnings
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, distributed, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from pruner_spec.training import Batch
from pruner_torch.layers import wide
from pruner_torch.metrics import Measures, Pruning
from pruner_torch.objective import Draws, objective

if TYPE_CHECKING:
    from pruner_torch.pi0 import Pi0

AXES = ("data", "fsdp")


def make_mesh(fsdp_devices: int = 1, *, device: torch.device | str | None = None) -> DeviceMesh:
    """All devices of all processes, as ("data", "fsdp").

    Args:
        fsdp_devices: over how many of them weights are split.
        device: of this process; None for PyTorch's default.

    Raises:
        ValueError: the devices cannot be divided so.
    """
    count = distributed.get_world_size()
    if fsdp_devices < 1 or count % fsdp_devices:
        raise ValueError(f"fsdp_devices: expected a divisor of {count} devices, got {fsdp_devices}")
    kind = torch.get_default_device() if device is None else torch.device(device)
    return init_device_mesh(kind.type, (count // fsdp_devices, fsdp_devices), mesh_dim_names=AXES)


def is_split(mesh: DeviceMesh | None) -> bool:
    """Whether weights are split over its devices, and not only repeated."""
    return mesh is not None and mesh["fsdp"].size() > 1


class Objective(nn.Module):
    """`objective` of a model, as DDP wants it: it looks for tensors in tuples."""

    def __init__(self, model: "Pi0") -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, draws: Draws) -> tuple[Float[Tensor, "B"], Pruning | None]:
        measures = objective(self.model, batch, draws)
        return measures.loss, measures.pruning


def split(model: "Pi0", mesh: DeviceMesh) -> None:
    """Splits the parameters over the mesh's "fsdp"; before they have memory, if they shall fit.

    What is only ever multiplied in the model's dtype is gathered in it: the same numbers, in half
    the bytes in a bfloat16 model.
    """
    within = mesh if mesh["data"].size() > 1 else mesh["fsdp"]
    narrow = fsdp.MixedPrecisionPolicy(
        param_dtype=model.dtype, reduce_dtype=wide(model.dtype), cast_forward_inputs=False
    )
    for block in model.vision.blocks:
        fsdp.fully_shard(block.attention, mesh=within, mp_policy=narrow)
        fsdp.fully_shard(block.mlp, mesh=within, mp_policy=narrow)
    for expert in (model.gemma.language, model.gemma.action):
        for layer in expert.layers:
            # Called apart from the rest of their attention, which is no module's forward.
            fsdp.fully_shard(layer.attention.out, mesh=within, mp_policy=narrow)
            fsdp.fully_shard(layer.attention, mesh=within, mp_policy=narrow)
            fsdp.register_fsdp_forward_method(layer.attention, "project")
            fsdp.fully_shard(layer.mlp, mesh=within, mp_policy=narrow)
    # It warns of views, which nobody may write into; nobody does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    fsdp.fully_shard(model.gemma.embedder, mesh=within)
    fsdp.fully_shard(model, mesh=within)
    fsdp.register_fsdp_forward_method(model, "loss_terms")


def repeated(model: "Pi0", mesh: DeviceMesh) -> DistributedDataParallel:
    """The objective of a model that every process has whole.

    Of a batch in parts the gradients are summed up after each, as FSDP2 does: `no_sync` and a
    static graph exclude each other.
    """
    index = None if model.device.type == "cpu" else [model.device]
    return DistributedDataParallel(
        Objective(model),
        device_ids=index,
        process_group=mesh["data"].get_group(),
        init_sync=False,
        gradient_as_bucket_view=True,
        static_graph=True,  # some parameters take no part in the loss
    )


def fill(tensor: Shaped[Tensor, "*shape"], value: Shaped[Tensor, "*shape"]) -> None:
    """Copies into a tensor, of which this process may hold a part."""
    if isinstance(tensor, DTensor):
        value = value.to(tensor.device_mesh.device_type)
        # No process sends anything: each has all of it, and takes its part.
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(value)


def largest(number: int, mesh: DeviceMesh) -> Int[Tensor, ""]:
    """The largest of the numbers that the processes give, all of which must; not waited for."""
    found = torch.tensor(number, device=mesh.device_type)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return found


def whole(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """A tensor from its parts; all processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(measures: Measures) -> Measures:
    """The measures of all processes' samples."""
    pruning = measures.pruning
    if pruning is not None:
        names = [field.name for field in dataclasses.fields(Pruning)]
        pruning = Pruning(**{name: _gathered(getattr(pruning, name)) for name in names})
    return Measures(loss=_gathered(measures.loss), pruning=pruning)


def _gathered(column: Shaped[Tensor, "B *rest"]) -> Shaped[Tensor, "all *rest"]:
    every = [torch.empty_like(column) for _ in range(distributed.get_world_size())]
    distributed.all_gather(every, column.contiguous())
    return torch.cat(every)
