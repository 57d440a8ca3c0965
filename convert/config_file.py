"""`config.json` beside the weights: openpi's fields, and what else a model cannot do without."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from convert import lerobot
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
    found = _object(path)
    if "type" in found:
        steps = folder / PREPROCESSOR_FILE
        return lerobot.config_fields(found, _object(steps) if steps.exists() else None)
    known = [name for name in _FIELDS if name not in found.get("assumed", ())]
    return {name: _field(path, name, found[name]) for name in known if found.get(name) is not None}


def _object(path: epath.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON object, got {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(found).__name__}")
    return found


def _field(path: epath.Path, name: str, value: Any) -> Any:
    if name not in _VARIANTS:
        return value
    try:
        if isinstance(value, str):
            _VARIANTS[name](value)
            return value
        return _variant(name, dict(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {name}: {error}") from error


def _variant(name: str, sizes: dict[str, Any]) -> GemmaVariant | VisionVariant:
    if name == "vision_variant":
        return VisionVariant(**sizes)
    lora = sizes.pop("lora", None)
    return GemmaVariant(**sizes, lora=None if lora is None else LoraVariant(**lora))
