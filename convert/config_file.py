"""`config.json` beside the weights: openpi's fields, and what else a model cannot do without."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from convert import json_file, lerobot
from convert.lerobot_stats import PREPROCESSOR_FILE
from pruner_spec.config import (
    GemmaVariant,
    LoraVariant,
    Pi0Config,
    VisionVariant,
    gemma_variant,
    vision_variant,
)

NAME = "config.json"

_FIELDS = (
    "action_dim",
    "action_horizon",
    "paligemma_variant",
    "action_expert_variant",
    "vision_variant",
    "max_token_len",
    "pi05",
    "discrete_state_input",
)
_VARIANTS = {
    "paligemma_variant": gemma_variant,
    "action_expert_variant": gemma_variant,
    "vision_variant": vision_variant,
}


def write(config: Pi0Config, precision: str, assumed: Sequence[str]) -> bytes:
    """The file. A variant without a name is written as its sizes.

    Args:
        config: the model's.
        precision: the weights'.
        assumed: fields that nothing said, and that are not to be trusted when the file is read.
    """
    fields: dict[str, Any] = {name: getattr(config, name) for name in _FIELDS}
    for name in _VARIANTS:
        if not isinstance(fields[name], str):
            fields[name] = dataclasses.asdict(fields[name])
    fields |= {"precision": precision, "assumed": list(assumed)}
    return (json.dumps(fields, indent=2) + "\n").encode()


def read(folder: epath.Path) -> dict[str, Any]:
    """Fields of `Pi0Config` that the folder's config file has: ours, openpi's or LeRobot's.

    Returns:
        Nothing where there is no such file.

    Raises:
        ValueError: the file is broken, or says what no model has.
    """
    path = folder / NAME
    if not path.exists():
        return {}
    found = json_file.read(path)
    if "type" in found:
        found = _lerobots(path, found)
    assumed = found.get("assumed", [])
    if not isinstance(assumed, list):
        raise ValueError(f"{path}: assumed: expected a list of names, got {assumed!r}")
    known = [name for name in _FIELDS if name not in assumed and found.get(name) is not None]
    return {name: _field(path, name, found[name]) for name in known}


def _lerobots(path: epath.Path, found: dict[str, Any]) -> dict[str, Any]:
    steps = path.parent / PREPROCESSOR_FILE
    preprocessor = json_file.read(steps) if steps.exists() else None
    try:
        return lerobot.config_fields(found, preprocessor)
    except ValueError as error:
        raise ValueError(f"{path.parent}: {error}") from error


def _field(path: epath.Path, name: str, value: Any) -> Any:
    if name not in _VARIANTS:
        return value
    try:
        if isinstance(value, str):
            _VARIANTS[name](value)
            return value
        return _variant(name, value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {name}: {error}") from error


def _variant(name: str, given: Any) -> GemmaVariant | VisionVariant:
    if not isinstance(given, dict):
        raise ValueError(f"expected a variant's name or its sizes, got {given!r}")
    sizes = {**given}
    lora = sizes.pop("lora", None)
    _check_sizes(sizes)
    if name == "vision_variant":
        return VisionVariant(**sizes)
    return GemmaVariant(**sizes, lora=None if lora is None else _lora(lora))


def _lora(given: Any) -> LoraVariant:
    if not isinstance(given, dict) or given.keys() != {"rank", "alpha"}:
        raise ValueError(f"lora: expected a rank and an alpha, got {given!r}")
    _check_sizes({"rank": given["rank"]})
    alpha = given["alpha"]
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise ValueError(f"alpha: expected a finite number, got {alpha!r}")
    return LoraVariant(rank=given["rank"], alpha=alpha)


def _check_sizes(sizes: Mapping[str, Any]) -> None:
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {size!r}")
