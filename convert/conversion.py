"""The two conversions as functions: openpi's JAX checkpoints to PyTorch's, and back."""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from convert import assets, config_file, lerobot, output, peft
from convert.folders import (
    DTYPES,
    Format,
    JaxFolder,
    Precision,
    PytorchFolder,
    torch_dtype,
    written_size,
)
from convert.mapping import Side, convert_all
from convert.reading import ADAPTER_FOLDER
from convert.source import Source, open_source
from convert.writing import Sink, closing
from pruner_spec.config import Pi0Config
from pruner_spec.layout import OPENPI_JAX, OPENPI_TORCH

Path_ = str | os.PathLike[str]
Lora = Literal["merge", "keep"]
Start = Callable[[int], Callable[[int], None]]  # takes a total of bytes, gives what counts them

_FLOATS = (*DTYPES.values(), np.dtype(np.float64))  # 8 bits need scales that stand elsewhere


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        source: the checkpoint that was read.
        output: the folder that was written.
        target: the layout and the model that were written.
        precision: of the weights.
        format: openpi's, LeRobot's, or Orbax.
        nbytes: of the tensors that were written.
    """

    source: Source
    output: Path
    target: Side
    precision: Precision
    format: Literal["openpi", "lerobot", "orbax"]
    nbytes: int

    def stored_dtype(self, name: str) -> np.dtype:
        """The dtype that was written for a parameter, by our name."""
        is_torch = self.target.layout is OPENPI_TORCH
        return torch_dtype(name, self.precision) if is_torch else DTYPES[self.precision]


def jax_to_pytorch(
    checkpoint_dir: Path_,
    output_path: Path_,
    *,
    config_name: str | None = None,
    precision: Precision = "bfloat16",
    format: Format = "openpi",
    lora: Lora = "merge",
    lora_scale: float | None = None,
    max_shard_size: str | int | None = None,
    omit_unused_lm_head: bool = False,
    asset_id: str | None = None,
    allow_non_finite: bool = False,
    overwrite: bool = False,
    start: Start | None = None,
) -> Conversion:
    """Converts a JAX checkpoint to safetensors that openpi's PyTorch model or LeRobot loads.

    Args:
        checkpoint_dir: an Orbax checkpoint; see `convert.reading.open_checkpoint`.
        output_path: the folder to write.
        config_name: the openpi config that the checkpoint is expected to be of.
        precision: of the weights. In the 16-bit ones stays float32 what openpi's model keeps in
            it; "float32" has the source's values, bit for bit.
        format: whose files.
        lora: adapters are merged into the weights, or kept beside them in PEFT's format.
        lora_scale: alpha / rank of the attention's adapters. None: what a config says, or 1.
        max_shard_size: of a file, such as "5GB"; None for one file.
        omit_unused_lm_head: leaves out the action expert's head for text, which no one reads, and
            which is zeros otherwise.
        asset_id: whose statistics go into LeRobot's files, where there are several.
        allow_non_finite: takes infinities and NaN.
        overwrite: replaces what is at `output_path`.
        start: is called with the bytes to write, and gives what is called with those written.

    Raises:
        ValueError: the checkpoint is none, is broken, or is not what it is said to be.
        OSError: it is not there, or the output cannot be written; nothing is left of it.
    """
    source = open_source(checkpoint_dir, config_name, lora_scale)
    _want(source, is_orbax=True)
    config = source.side.config if lora == "keep" else source.side.config.without_lora()
    if format == "lerobot" and config.has_lora:
        raise ValueError("lora: expected 'merge' with the format 'lerobot', got 'keep'")
    if format == "lerobot" and max_shard_size is not None:
        raise ValueError(
            f"max_shard_size: expected none with the format 'lerobot', which reads one file; "
            f"got {max_shard_size!r}"
        )
    target = Side(OPENPI_TORCH, config)
    path = _place(output_path, source, overwrite)
    shard_size = None if max_shard_size is None else parse_size(max_shard_size)
    files = _files(source, config, precision, format, asset_id)
    written = written_size(target, precision)
    output.check_space(path, written)
    count = (start or _silent)(written)

    def make(folder: Path) -> Sink:
        return PytorchFolder(
            folder,
            config,
            precision,
            format=format,
            max_shard_size=shard_size,
            unused=not omit_unused_lm_head,
            allow_non_finite=allow_non_finite,
            progress=count,
        )

    _convert(source, target, path, make, files, overwrite)
    return Conversion(source, path, target, precision, format, written)


def pytorch_to_jax(
    checkpoint_dir: Path_,
    output_path: Path_,
    *,
    config_name: str | None = None,
    precision: Precision = "float32",
    lora: Lora = "keep",
    allow_non_finite: bool = False,
    overwrite: bool = False,
    start: Start | None = None,
) -> Conversion:
    """Converts safetensors, openpi's or LeRobot's, to an Orbax checkpoint that openpi restores.

    Args:
        checkpoint_dir: a folder with model.safetensors, or its shards and their index.
        output_path: the folder to write; the weights go to its `params`.
        config_name: the openpi config that the checkpoint is expected to be of.
        precision: of all weights. "float32", openpi's, has the source's values, bit for bit.
        lora: an adapter beside the weights is kept as openpi's LoRA arrays, or merged.
        allow_non_finite: takes infinities and NaN.
        overwrite: replaces what is at `output_path`.
        start: is called with the bytes to write, and gives what is called with those written.

    Raises:
        ValueError: the checkpoint is none, is broken, or is not what it is said to be.
        OSError: it is not there, or the output cannot be written; nothing is left of it.
    """
    source = open_source(checkpoint_dir, config_name)
    _want(source, is_orbax=False)
    config = source.side.config if lora == "keep" else source.side.config.without_lora()
    target = Side(OPENPI_JAX, config)
    path = _place(output_path, source, overwrite)
    files = {f"{assets.FOLDER}/{name}": data for name, data in source.stats.items()}
    files[config_file.NAME] = config_file.write(config, precision, source.assumed)
    written = written_size(target, precision)
    output.check_space(path, written)
    count = (start or _silent)(written)

    def make(folder: Path) -> Sink:
        options = {"allow_non_finite": allow_non_finite, "progress": count}
        return JaxFolder(folder, config, precision, **options)

    _convert(source, target, path, make, files, overwrite)
    return Conversion(source, path, target, precision, "orbax", written)


def parse_size(size: str | int) -> int:
    """Bytes from a text such as "5GB", "500MB" or "2GiB", or a number of bytes.

    Raises:
        ValueError: it is another text, or not above 0.
    """
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).strip().upper())
    if match is None or match[2] not in units or float(match[1]) <= 0:
        raise ValueError(f"max_shard_size: expected a size such as '5GB', got {size!r}")
    return int(float(match[1]) * units[match[2]])


def _silent(total: int) -> Callable[[int], None]:
    return lambda count: None


def _want(source: Source, *, is_orbax: bool) -> None:
    """Raises a ValueError unless the source is of that kind, and its arrays are weights."""
    if source.is_orbax != is_orbax:
        wanted, command = (
            ("an Orbax", "convert_pytorch_model_to_jax")
            if is_orbax
            else ("a safetensors", "convert_jax_model_to_pytorch")
        )
        raise ValueError(
            f"checkpoint_dir: expected {wanted} checkpoint, got {source.place}, "
            f"which {command} takes"
        )
    other = [
        f"{name}: expected floating-point numbers, got {array.dtype}"
        for name, array in source.arrays.items()
        if array.dtype not in _FLOATS
    ]
    if other:
        raise ValueError("\n".join([f"{source.place}: expected weights, got other arrays", *other]))


def _place(output_path: Path_, source: Source, overwrite: bool) -> Path:
    """The output's place, if it may be written."""
    if re.match(r"\w+:/", os.fspath(output_path)):
        raise ValueError(f"output_path: expected a folder on this machine, got {output_path}")
    path = Path(os.path.realpath(output_path))
    is_local = "://" not in str(source.place)
    output.check_place(path, Path(source.place) if is_local else None, overwrite=overwrite)
    return path


def _files(
    source: Source, config: Pi0Config, precision: Precision, format: Format, asset_id: str | None
) -> dict[str, bytes]:
    """What stands beside the weights, by path."""
    files = {f"{assets.FOLDER}/{name}": data for name, data in source.stats.items()}
    if format == "lerobot":
        stats = _chosen_stats(source, asset_id)
        return files | lerobot.policy_files(config, stats, precision=precision)
    files[config_file.NAME] = config_file.write(config, precision, source.assumed)
    if config.has_lora:
        files[f"{ADAPTER_FOLDER}/{peft.NAME}"] = peft.dumps(config)
    return files


def _chosen_stats(source: Source, asset_id: str | None) -> Mapping | None:
    """The one set of statistics that LeRobot's files have room for."""
    found = {name.removesuffix(assets.FILE).rstrip("/"): name for name in source.stats}
    if asset_id is not None and asset_id not in found:
        raise ValueError(f"asset_id: expected one of {sorted(found)}, got {asset_id!r}")
    if asset_id is None and len(found) > 1:
        raise ValueError(
            f"asset_id: expected whose statistics LeRobot's files are to have, of {sorted(found)}"
        )
    if not found:
        return None
    name = found[next(iter(found)) if asset_id is None else asset_id]
    return assets.statistics(name, source.stats[name])


def _convert(
    source: Source,
    target: Side,
    path: Path,
    make: Callable[[Path], Sink],
    files: Mapping[str, bytes],
    overwrite: bool,
) -> None:
    """All of a source into a folder that appears when everything is in it.

    Args:
        make: gives what takes the weights in a folder.
        files: what stands beside them, by path.
    """
    with output.folder_in_full(path, overwrite=overwrite) as folder:
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        with closing(make(folder)) as sink:
            convert_all(source.arrays, source.side, target, sink.write)
