"""Weights into a model and out of it; the layouts are `pruner_spec.layout`'s."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from convert.reading import LazyArray, open_checkpoint
from pruner_spec import layout
from pruner_spec.config import Pi0Config
from pruner_spec.parameters import Parameter, parameter_table

if TYPE_CHECKING:
    from pruner_torch.pi0 import Pi0


def load(
    source: str | os.PathLike[str] | Mapping[str, Any],
    config: Pi0Config,
    *,
    device: torch.device | str | None = None,
) -> "Pi0":
    """A model with the weights of a checkpoint, in the dtypes of the config.

    Args:
        source: a checkpoint's path (see `convert.reading.open_checkpoint`), or a tree of tensors or
            of NumPy's arrays; in openpi's layouts or ours, the names say which.
        config: the model the weights are for.
        device: where the parameters are to be; None for PyTorch's default.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: the path is no checkpoint, or the weights are not exactly those of the config's
            model; lists all differences, before any array is read.
    """
    from pruner_torch.pi0 import Pi0  # here, since pi0 imports this module

    named = read(source, config)
    with torch.device("meta"):
        model = Pi0(config, seed=None)
    assign(model, named, device=device)
    return model


def read(
    source: str | os.PathLike[str] | Mapping[str, Any],
    config: Pi0Config,
    *,
    missing: Sequence[str] = (),
    ignored: Sequence[str] = (),
) -> Iterator[tuple[str, np.ndarray]]:
    """The weights of a checkpoint by our names, each read when it is asked for.

    Arguments and errors are those of `load`, the errors raised by the call; `missing` and
    `ignored` are `layout.to_named`'s.
    """
    tree = open_checkpoint(source) if isinstance(source, str | os.PathLike) else source
    arrays = {name: _readable(leaf) for name, leaf in layout.flatten(tree).items()}
    return layout.to_named(arrays, config, missing=missing, ignored=ignored)


def named_parameters(model: "Pi0") -> dict[str, np.ndarray]:
    """A model's parameters by our names, layers stacked, in their dtypes; a copy."""
    tensors = model.state_dict()
    table = parameter_table(model.config)
    return {name: stacked(tensors, parameter) for name, parameter in table.items()}


def assign(
    model: "Pi0",
    named: Iterable[tuple[str, np.ndarray]],
    *,
    device: torch.device | str | None = None,
) -> None:
    """Gives a model all its parameters, cast to the dtypes it stores them in.

    Args:
        model: on any device, "meta" too; what it had is replaced, one parameter at a time.
        named: pairs of our name and array [layers, ...], which is copied.
        device: where the parameters are to be; None for PyTorch's default.

    Raises:
        ValueError: they are not exactly the model's parameters; the model is then half assigned.
    """
    table = parameter_table(model.config)
    names = {name for parameter in table.values() for name in parameter.torch_names}
    assert model.state_dict().keys() == names
    device = torch.get_default_device() if device is None else device
    for parameter, array in layout.stored(named, model.config):
        state = unstacked(array, parameter, device=device)
        model.load_state_dict(state, strict=False, assign=True)


def stacked(arrays: Mapping[str, Shaped[Tensor, "..."]], parameter: Parameter) -> np.ndarray:
    """A family's array [layers, ...] from tensors by the names in the model; a copy."""
    layers = np.stack([_numpy(arrays[name]) for name in parameter.torch_names])
    return layers.reshape(parameter.stacked_shape)


def lazily_stacked(arrays: Mapping[str, Shaped[Tensor, "..."]], parameter: Parameter) -> LazyArray:
    """As `stacked`, but each layer is read when it is used, if the tensors are still there."""
    tensors = [arrays[name] for name in parameter.torch_names]

    def read(index: Any) -> np.ndarray:
        if parameter.layers is None:
            return np.array(_numpy(tensors[0][index]))
        if isinstance(index, int):
            return np.array(_numpy(tensors[index]))
        return np.stack(
            [_numpy(tensor) for tensor in tensors[slice(None) if index is ... else index]]
        )

    dtype = np.dtype(str(tensors[0].dtype).removeprefix("torch."))
    return LazyArray(parameter.stacked_shape, dtype, read)


def unstacked(
    array: np.ndarray, parameter: Parameter, *, device: torch.device | str = "cpu"
) -> dict[str, Shaped[Tensor, "..."]]:
    """The inverse of `stacked`: tensors by the names in the model, as copies on a device."""
    layers = [array] if parameter.layers is None else array
    tensors = (_tensor(layer, device) for layer in layers)
    return dict(zip(parameter.torch_names, tensors, strict=True))


def _tensor(array: np.ndarray, device: torch.device | str) -> Tensor:
    """A copy, sent as it lies in memory: another layout's kernels are transposed on the device."""
    order = np.argsort([-stride for stride in array.strides], kind="stable")
    lying = array.transpose(order)
    if not (lying.flags.c_contiguous and lying.flags.writeable):  # PyTorch wants to write
        lying = np.array(lying, order="C")
    is_bfloat16 = array.dtype == ml_dtypes.bfloat16
    there = torch.from_numpy(lying.view(np.int16) if is_bfloat16 else lying).to(device, copy=True)
    there = there.view(torch.bfloat16) if is_bfloat16 else there
    return there.permute(np.argsort(order).tolist()).contiguous()


def _numpy(tensor: Tensor) -> np.ndarray:
    """A view where the tensor is on the CPU."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _readable(leaf: Any) -> Any:
    """NumPy reads no bfloat16 tensors, none on a GPU, and none that require gradients."""
    if not isinstance(leaf, Tensor):
        return leaf
    dtype = np.dtype(str(leaf.dtype).removeprefix("torch."))
    return LazyArray(tuple(leaf.shape), dtype, lambda index: _numpy(leaf[index]))
