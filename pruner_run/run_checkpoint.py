"""A run's checkpoints: `<run>/<step>/`, each there in full or not at all.

    params/ or model.safetensors   the weights as they are used, in openpi's layout, float32:
                                   their average where the run has one (JAX, PyTorch)
    train_state.safetensors        what else a run needs to go on, by our names: Adam's moments,
                                   and the weights themselves where the average stands above; in
                                   a float64 run the average too, which float32 does not hold
    config.json, assets/           as beside any checkpoint of openpi's
    run.json                       the step, the config, and of each file its size and checksum

Nothing here depends on the framework: a run goes on in either.
"""

import dataclasses
import functools
import json
import logging
import shutil
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from convert import config_file, json_file, output, peft
from convert.folders import JaxFolder, PytorchFolder
from convert.lazy_array import LazyArray
from convert.mapping import Side, convert_all
from convert.reading import ADAPTER_FOLDER, open_checkpoint
from convert.safetensors_file import SafetensorsFile, open_safetensors
from convert.writing import closing
from pruner_run.configs import TrainConfig
from pruner_spec.config import Pi0Config
from pruner_spec.layout import JAX, OPENPI_JAX, OPENPI_TORCH, to_named
from pruner_spec.training import TrainState, master_dtype

STATE_FILE, RUN_FILE = "train_state.safetensors", "run.json"

_BLOCK = 64 << 20  # bytes of an array, or of a file a thread, that are in memory at once

# What may change from one part of a run to the next; all else makes the run what it is.
_MAY_CHANGE = {
    "backend", "resume", "overwrite", "weight_path", "pytorch_weight_path", "tokenizer_path",
    "num_workers", "log_interval", "save_interval", "keep_period", "checkpoint_base_dir",
    "assets_base_dir", "fsdp_devices", "tensorboard_enabled", "wandb_enabled", "project_name",
    "gradient_checkpointing", "pytorch_compile", "accumulation", "exp_name", "weight_missing",
    "weight_ignored", "policy_metadata",
}  # fmt: skip

logger = logging.getLogger(__name__)


def save(config: TrainConfig, step: int, state: TrainState, stats: Mapping[str, bytes]) -> Path:
    """Writes the checkpoint of a step, and removes those that it makes needless.

    Args:
        config: the run's.
        step: the number of the step that was just made.
        state: after it.
        stats: normalisation statistics, by path below `assets`.

    Raises:
        OSError: it cannot be written; the checkpoints before are still there.
    """
    path = config.run_dir / str(step)
    used = state.parameters if state.average is None else state.average
    arrays = {
        f"{part}/{name}": array
        for part in _parts_beside(config.model, state)
        for name, array in getattr(state, part).items()
    }
    size = sum(array.nbytes for array in (*arrays.values(), *used.values()))
    output.check_space(path, size)
    with output.folder_in_full(path, overwrite=True) as folder:
        _write_weights(folder, config, used)
        _write_state(folder / STATE_FILE, arrays)
        (folder / config_file.NAME).write_bytes(config_file.write(config.model, "float32", ()))
        for name, data in stats.items():
            (folder / "assets" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "assets" / name).write_bytes(data)
        record = {"step": step, "config": described(config), "files": _files(folder)}
        (folder / RUN_FILE).write_text(json.dumps(record, indent=2) + "\n")
    _prune(config, step)
    return path


def newest(config: TrainConfig) -> Path | None:
    """The last whole checkpoint of a run; damaged ones are reported and passed over.

    Raises:
        ValueError: it is of another config, names what differs; or all there are are damaged.
    """
    found = sorted(steps(config), reverse=True)
    for step in found:
        path = config.run_dir / str(step)
        try:
            record = _checked(path)
        except (OSError, ValueError) as error:
            logger.warning("passing over a damaged checkpoint: %s", error)
            continue
        _check_config(path, record["config"], described(config))
        return path
    if found:
        raise ValueError(
            f"resume: expected a whole checkpoint in {config.run_dir}, got damaged ones alone, of "
            f"the steps {found}; --overwrite begins again"
        )
    return None


def load(path: Path, model: Pi0Config) -> TrainState:
    """The state in a checkpoint, its arrays read as they are taken.

    Raises:
        ValueError: a file is damaged, or not of this model.
    """
    parts: dict[str, dict[str, Any]] = {"first": {}, "second": {}}
    for name, array in open_safetensors(epath.Path(path / STATE_FILE)).items():
        part, _, parameter = name.partition("/")
        parts.setdefault(part, {})[parameter] = array
    if not _is_exact(model):
        used = dict(to_named(open_checkpoint(path), model))
        parts["average" if "parameters" in parts else "parameters"] = used
    return TrainState(
        step=json.loads((path / RUN_FILE).read_text())["step"] + 1,
        parameters=parts["parameters"],
        average=parts.get("average"),
        first=parts["first"],
        second=parts["second"],
    )


def recorded(path: epath.Path) -> dict[str, Any] | None:
    """The config in a checkpoint's record, as `described` gave it; None where there is no record.

    Raises:
        ValueError: the record is broken.
    """
    if not (path / RUN_FILE).exists():
        return None
    record = json_file.read(path / RUN_FILE)
    if not isinstance(record.get("config"), dict):
        raise ValueError(f"{path / RUN_FILE}: expected a run's config in it, got {sorted(record)}")
    return record["config"]


def tidy(config: TrainConfig) -> None:
    """Removes what was left of checkpoints as the run was killed while it wrote them.

    Raises:
        OSError: another process is writing one of them.
    """
    hidden = {path.stem.removeprefix(".") for path in config.run_dir.glob(".*.*")}
    for step in sorted(hidden):
        if step.isdecimal():
            output.settle(config.run_dir / step)


def steps(config: TrainConfig) -> list[int]:
    """The steps that there are checkpoints of."""
    found = config.run_dir.iterdir() if config.run_dir.exists() else ()
    return sorted(int(path.name) for path in found if path.name.isdecimal())


def described(config: TrainConfig) -> dict[str, Any]:
    """What makes a run, as JSON has it."""
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in _MAY_CHANGE}
    return json.loads(json.dumps(fields, default=str))


def _check_config(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    wrong = list(_differences("", expected, found))
    if wrong:
        raise ValueError(
            "\n".join(
                [f"resume: {path} is of a run with another config; to resume it, set", *wrong]
            )
        )


def _differences(name: str, expected: Any, found: Any) -> list[str]:
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        return [
            line
            for key in sorted(expected.keys() | found.keys())
            for line in _differences(f"{name}.{key}".strip("."), expected.get(key), found.get(key))
        ]
    return [] if expected == found else [f"--{name}: expected {found!r}, got {expected!r}"]


def _is_exact(model: Pi0Config) -> bool:
    """Whether the state's file has the weights in full: float32, openpi's, would round them."""
    return master_dtype(model) == "float64"


def _parts_beside(model: Pi0Config, state: TrainState) -> list[str]:
    """The fields of the state that stand in its own file."""
    parts = ["first", "second"]
    if state.average is not None or _is_exact(model):
        parts.append("parameters")
    if state.average is not None and _is_exact(model):
        parts.append("average")
    return parts


def _write_weights(
    folder: Path, config: TrainConfig, named: Mapping[str, np.ndarray | LazyArray]
) -> None:
    """In openpi's layout of the run's framework."""
    source = Side(JAX, config.model)
    arrays = {name: _lazy(array) for name, array in named.items()}
    is_jax = config.backend == "jax"
    target = Side(OPENPI_JAX if is_jax else OPENPI_TORCH, config.model)
    make = JaxFolder if is_jax else PytorchFolder
    with closing(make(folder, config.model, "float32", allow_non_finite=True)) as sink:
        convert_all(arrays, source, target, sink.write)
    if config.model.has_lora and not is_jax:
        (folder / ADAPTER_FOLDER / peft.NAME).write_bytes(peft.dumps(config.model))


def _lazy(array: np.ndarray | LazyArray) -> LazyArray:
    if isinstance(array, LazyArray):
        return array
    return LazyArray(array.shape, array.dtype, lambda index: array[index])


def _write_state(path: Path, arrays: Mapping[str, np.ndarray | LazyArray]) -> None:
    tensors = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    file = SafetensorsFile(path, tensors, {"format": "np"})
    for name, array in arrays.items():
        offset, rows = 0, max(1, _BLOCK * array.shape[0] // array.nbytes)
        for piece in _lazy(array).pieces(rows):
            file.write(name, offset, np.ascontiguousarray(piece))
            offset += piece.nbytes
    file.close()


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): _described_file(path) for path in files}


def _described_file(path: Path) -> dict[str, Any]:
    """A file's size, and the CRC-32 of its blocks' CRC-32, which threads compute."""
    size = path.stat().st_size
    with ThreadPoolExecutor() as pool:
        blocks = pool.map(functools.partial(_crc32, path), range(0, size, _BLOCK))
        found = zlib.crc32(b"".join(block.to_bytes(4, "big") for block in blocks))
    return {"bytes": size, "checksum": f"{found:08x}"}


def _crc32(path: Path, start: int) -> int:
    with path.open("rb") as file:
        file.seek(start)
        return zlib.crc32(file.read(_BLOCK))


def _checked(path: Path) -> dict[str, Any]:
    """A checkpoint's record, if all files are there and are what they were.

    Raises:
        OSError, ValueError: they are not.
    """
    record = json_file.read(path / RUN_FILE)
    for key in ("config", "files"):
        if not isinstance(record.get(key), dict):
            raise ValueError(f"{path / RUN_FILE}: expected {key} in it, got {sorted(record)}")
    for name, expected in record["files"].items():
        if (found := _described_file(path / name)) != expected:
            raise ValueError(f"{path / name}: expected {expected}, got {found}")
    return record


def _prune(config: TrainConfig, step: int) -> None:
    for other in steps(config):
        is_kept = config.keep_period is not None and other % config.keep_period == 0
        if other < step and not is_kept:
            shutil.rmtree(config.run_dir / str(other))
