"""An adapter's configuration in PEFT's format.

PEFT multiplies B · A by lora_alpha / r. An attention adapter of openpi's has its rank a head, so
as one matrix it has heads · rank; its patterns here give every module the r and alpha that make
PEFT's factor openpi's.
"""

import json
import re
from typing import Any

from etils import epath

from convert import json_file
from pruner_spec import lora
from pruner_spec.config import Pi0Config
from pruner_spec.layout import OPENPI_TORCH

NAME = "adapter_config.json"

_FACTOR = re.compile(r"(?P<module>.*)\.lora_A\.weight")


def config(model: Pi0Config) -> dict[str, Any]:
    """The configuration of all adapters of a model.

    Args:
        model: with adapters.
    """
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for row in OPENPI_TORCH.rows_of(model):
        if match := _FACTOR.fullmatch(row.theirs):
            # Both "." and "{layer}" as PEFT's patterns, which are regular expressions, want them.
            module = re.escape(match["module"]).replace(r"\{layer\}", r"\d+")
            is_action = row.ours[0].startswith("gemma.action.")
            variant = (model.action_expert if is_action else model.paligemma).lora
            assert variant is not None
            ranks[module] = row.shape(model)[0]
            alphas[module] = ranks[module] * lora.adapter_scale(row.ours[0], variant)
    first = next(iter(ranks))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "target_modules": "|".join(f"(?:{module})" for module in ranks),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }


def check(folder: epath.Path, model: Pi0Config) -> None:
    """Whether an adapter beside the weights is applied as the model applies it.

    Raises:
        ValueError: its configuration is missing, or says other ranks or factors.
    """
    path = folder / NAME
    if not path.exists():
        raise ValueError(f"{folder}: expected {NAME} beside the adapter, got none")
    found, expected = json_file.read(path), config(model)
    for name in ("use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern"):
        if found.get(name) != expected[name]:
            raise ValueError(f"{path}: {name}: expected {expected[name]}, got {found.get(name)}")


def dumps(model: Pi0Config) -> bytes:
    """The file."""
    return (json.dumps(config(model), indent=2) + "\n").encode()
