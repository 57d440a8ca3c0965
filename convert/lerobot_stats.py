"""Normalisation statistics: openpi's, and as the steps of a LeRobot policy keep them.

LeRobot normalises as openpi does, but for openpi's 1e-6 (`EPSILON`), which it has in fewer places:

- π0, forwards: (x - mean) / (std + 1e-6), the same. Backwards: x * std + mean, where openpi has
  x * (std + 1e-6) + mean.
- π0.5, both ways: a range of q99 - q01, where openpi has q99 - q01 + 1e-6. Where q99 = q01 the
  range is 1e-6 in both.

A robot's state has to be as long as its statistics: openpi cuts longer ones, and LeRobot fails.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from convert import json_file

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "policy_preprocessor.json"
POSTPROCESSOR_FILE = "policy_postprocessor.json"

EPSILON = 1e-6
FEATURES = {"state": "observation.state", "actions": "action"}
STATISTICS = ("mean", "std", "q01", "q99")

# How openpi normalises, by the type of LeRobot's policy. Its file has a mean and std in any case.
MODES = {"pi0": "MEAN_STD", "pi05": "QUANTILES"}
_ALWAYS = ("mean", "std")
_NEEDED = {"MEAN_STD": _ALWAYS, "QUANTILES": STATISTICS}

NormStats = Mapping[str, Mapping[str, ArrayLike | None]]
Arrays = dict[str, dict[str, np.ndarray]]


def checked(norm_stats: NormStats, mode: str, most: int) -> Arrays:
    """openpi's "norm_stats" as float64 arrays.

    Args:
        norm_stats: of "state" and of "actions" the "mean", "std", "q01" and "q99".
        mode: how LeRobot normalises with them, which decides what is needed.
        most: numbers in a statistic, at most.

    Raises:
        ValueError: one is missing, unknown, not a vector of finite numbers, or of another length.
    """
    if norm_stats.keys() != FEATURES.keys():
        raise ValueError(f"norm_stats: expected {sorted(FEATURES)}, got {sorted(norm_stats)}")
    return {
        key: _complete(_arrays(norm_stats[key], key, most), _NEEDED[mode], key) for key in FEATURES
    }


def tensors(stats: Arrays) -> bytes:
    """A step's safetensors file, in float64 as openpi has it; LeRobot casts to float32."""
    flat = {(key, name): array for key in stats for name, array in stats[key].items()}
    return save({f"{FEATURES[key]}.{name}": array for (key, name), array in flat.items()})


def norm_stats_of(folder: pathlib.Path) -> Arrays | None:
    """openpi's "norm_stats" from a folder of LeRobot's; None where nothing is normalised.

    Statistics that openpi doesn't know, such as minima, are left out.

    Raises:
        FileNotFoundError: there is no config, or no file with statistics that a step names.
        ValueError: the policy normalises otherwise than openpi's, lacks statistics or a mean or
            std, which openpi's file can't do without, or has broken files.
    """
    mode = MODES[policy_type(json_file.read(folder / CONFIG_FILE))]
    places = {
        "state": (PREPROCESSOR_FILE, "normalizer_processor", "STATE"),
        "actions": (POSTPROCESSOR_FILE, "unnormalizer_processor", "ACTION"),
    }
    found: Arrays = {}
    for key, (file, step_name, kind) in places.items():
        for step in _steps(folder / file, step_name):
            stats = _stored(folder, step, FEATURES[key])
            used = _norm_map(step, folder / file).get(kind, "IDENTITY")
            if stats and used != mode:
                raise ValueError(f"{folder / file}: {kind}: expected openpi's {mode}, got {used}")
            if stats:
                found[key] = _complete(stats, _ALWAYS, key)
    if lacking := sorted(FEATURES.keys() - found.keys()) if found else []:
        raise ValueError(f"{folder}: expected statistics of {sorted(FEATURES)}, lacks {lacking}")
    return found or None


def policy_type(policy_config: Mapping[str, Any]) -> str:
    """The type in a `config.json`; raises ValueError unless it is "pi0" or "pi05"."""
    policy = policy_config.get("type")
    if policy not in MODES:
        raise ValueError(f"type: expected a LeRobot policy of {sorted(MODES)}, got {policy!r}")
    return policy


def _arrays(stats: Mapping[str, ArrayLike | None], key: str, most: int) -> dict[str, np.ndarray]:
    unknown = sorted(stats.keys() - {*STATISTICS})
    if unknown:
        raise ValueError(f"norm_stats: {key}: expected {list(STATISTICS)}, got also {unknown}")
    given = {name: stats[name] for name in STATISTICS if stats.get(name) is not None}
    arrays = {name: np.asarray(value, np.float64) for name, value in given.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    if len({*shapes.values()}) > 1 or any(
        array.ndim != 1 or not 1 <= array.size <= most for array in arrays.values()
    ):
        raise ValueError(
            f"norm_stats: {key}: expected vectors of one length in 1..{most}, got {shapes}"
        )
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"norm_stats: {key}: {name}: expected finite numbers, got {array}")
    return arrays


def _complete(
    stats: dict[str, np.ndarray], needed: tuple[str, ...], key: str
) -> dict[str, np.ndarray]:
    missing = [name for name in needed if name not in stats]
    if missing:
        raise ValueError(f"norm_stats: {key}: expected {missing} too, got {sorted(stats)}")
    return stats


def steps_of(pipeline: Mapping[str, Any], file: str | pathlib.Path) -> list[dict[str, Any]]:
    """The steps in the content of a `policy_preprocessor.json`; raises ValueError if it is none."""
    steps = pipeline.get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ValueError(f"{file}: expected a pipeline's 'steps', got {steps!r}")
    return steps


def _steps(file: pathlib.Path, name: str) -> list[dict[str, Any]]:
    steps = steps_of(json_file.read(file), file) if file.exists() else []
    return [step for step in steps if step.get("registry_name") == name]


def _norm_map(step: dict[str, Any], file: pathlib.Path) -> dict[str, Any]:
    settings = step.get("config")
    norm_map = settings.get("norm_map") if isinstance(settings, dict) else None
    if not isinstance(norm_map, dict):
        raise ValueError(f"{file}: norm_map: expected modes by kind, got {norm_map!r}")
    return norm_map


def _stored(folder: pathlib.Path, step: dict[str, Any], feature: str) -> dict[str, np.ndarray]:
    """A feature's statistics in a step's file, where it has one."""
    if "state_file" not in step:
        return {}
    path = folder / str(step["state_file"])
    if not path.exists():
        raise FileNotFoundError(f"expected statistics, got a path that does not exist: {path}")
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, got {error}") from error
    names = {name: f"{feature}.{name}" for name in STATISTICS}
    return {name: stored[full] for name, full in names.items() if full in stored}
