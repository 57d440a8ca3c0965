"""What a checkpoint's weights are written into: openpi's PyTorch folder, or its Orbax one."""

from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from convert import lerobot
from convert.mapping import Side
from convert.reading import ADAPTER_FILE, ADAPTER_FOLDER, ADAPTER_PREFIX, SAFETENSORS_FILE
from convert.writing import OrbaxSink, SafetensorsSink, Tensors, size_of
from pruner_spec import lora as adapters
from pruner_spec.config import Pi0Config
from pruner_spec.layout import OPENPI_JAX, OPENPI_TORCH
from pruner_spec.parameters import parameter_dtype

Precision = Literal["bfloat16", "float32", "float16"]
Format = Literal["openpi", "lerobot"]

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
}


class PytorchFolder:
    """model.safetensors, and beside it an adapter in PEFT's format for a model that has any.

    Args:
        folder: where to.
        config: the model's.
        precision: of the weights.
        format: LeRobot's has another prefix before every name.
        max_shard_size: of a file; None for one file.
        unused: with the head that nothing reads.
        options: of both files; see `SafetensorsSink`.
    """

    def __init__(
        self,
        folder: Path,
        config: Pi0Config,
        precision: Precision,
        *,
        format: Format = "openpi",
        max_shard_size: int | None = None,
        unused: bool = True,
        **options: Any,
    ) -> None:
        self._prefix, metadata = naming(format)
        tensors = torch_tensors(config, precision, unused=unused)
        self._factors = {name for name in tensors if ".lora_" in name}
        weights = {self._prefix + n: t for n, t in tensors.items() if n not in self._factors}
        self._weights = SafetensorsSink(
            folder, _stem(SAFETENSORS_FILE), weights, metadata, max_shard_size=max_shard_size,
            **options,
        )  # fmt: skip
        self._adapter = None
        if self._factors:
            (folder / ADAPTER_FOLDER).mkdir(exist_ok=True)
            factors = {ADAPTER_PREFIX + name: tensors[name] for name in self._factors}
            self._adapter = SafetensorsSink(
                folder / ADAPTER_FOLDER, _stem(ADAPTER_FILE), factors, {"format": "pt"}, **options
            )

    def write(self, name: str, start: int | None, array: np.ndarray) -> None:
        if name in self._factors and self._adapter is not None:
            self._adapter.write(ADAPTER_PREFIX + name, start, array)
        else:
            self._weights.write(self._prefix + name, start, array)

    def close(self) -> None:
        for sink in self._sinks():
            sink.close()

    def abandon(self) -> None:
        for sink in self._sinks():
            sink.abandon()

    def _sinks(self) -> list[SafetensorsSink]:
        return [self._weights] + ([] if self._adapter is None else [self._adapter])


class JaxFolder:
    """An Orbax checkpoint in `params`.

    Args:
        folder: where to.
        config: the model's.
        precision: of all weights.
        options: see `OrbaxSink`.
    """

    def __init__(
        self, folder: Path, config: Pi0Config, precision: Precision, **options: Any
    ) -> None:
        tensors = {f"params/{name}": t for name, t in jax_tensors(config, precision).items()}
        self._sink = OrbaxSink(folder / "params", tensors, **options)

    def write(self, name: str, start: int | None, array: np.ndarray) -> None:
        self._sink.write(f"params/{name}", start, array)

    def close(self) -> None:
        self._sink.close()

    def abandon(self) -> None:
        self._sink.abandon()


def torch_tensors(config: Pi0Config, precision: Precision, *, unused: bool = True) -> Tensors:
    """Dtype and shape of every tensor of openpi's PyTorch file, by name; not of the alias.

    Args:
        config: the model's.
        precision: of the weights.
        unused: with the head that nothing reads.
    """
    found = {
        name: (torch_dtype(row.ours[0], precision), row.shape(config))
        for row in OPENPI_TORCH.rows_of(config)
        for name in row.names(config)
    }
    if unused:
        shape = (config.action_expert.vocab_size, config.action_expert.width)
        found[OPENPI_TORCH.unused[0]] = (DTYPES[precision], shape)
    return found


def jax_tensors(config: Pi0Config, precision: Precision) -> Tensors:
    """Dtype and shape of every array of openpi's JAX checkpoint, by name."""
    shapes = OPENPI_JAX.shapes(config)
    return {name: (DTYPES[precision], shape) for name, shape in shapes.items()}


def written_size(side: Side, precision: Precision) -> int:
    """Bytes of all tensors of a side; the unused head is a hole and takes none."""
    if side.layout is OPENPI_JAX:
        return sum(size_of(*tensor) for tensor in jax_tensors(side.config, precision).values())
    tensors = torch_tensors(side.config, precision, unused=False)
    return sum(size_of(*tensor) for tensor in tensors.values())


def torch_dtype(name: str, precision: Precision) -> np.dtype:
    """Of a parameter, by our name. Adapters are small, and what they add is small beside the
    weights: they stay float32, with what openpi's model keeps in it."""
    is_kept = adapters.is_adapter(name) or parameter_dtype(name, "bfloat16") == "float32"
    return DTYPES["float32" if is_kept else precision]


def naming(format: Format) -> tuple[str, dict[str, str]]:
    """What stands before every tensor's name, and the entries of the file's header."""
    prefix = lerobot.TENSOR_PREFIX if format == "lerobot" else ""
    tied = {prefix + alias: prefix + name for alias, name in OPENPI_TORCH.aliases.items()}
    return prefix, {"format": "pt"} | tied


def _stem(file: str) -> str:
    return file.removesuffix(".safetensors")
