"""A checkpoint that is to be converted: what it holds, and what model it is of."""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from convert import assets, config_file, peft
from convert.lazy_array import LazyArray
from convert.lerobot_stats import PREPROCESSOR_FILE, norm_stats_of
from convert.mapping import Side
from convert.orbax_reading import open_orbax
from convert.reading import ADAPTER_FOLDER, locate, open_checkpoint
from pruner_spec.config import LoraVariant, Pi0Config, gemma_variant, variant_name, vision_variant
from pruner_spec.layout import by_row, flatten, renamed
from pruner_spec.openpi_configs import openpi_config
from pruner_spec.recognition import recognise

_EXPERTS = ("paligemma_variant", "action_expert_variant")
_NAMED = (*_EXPERTS, "vision_variant", "pi05", "action_dim")
_OPEN = ("action_horizon", "max_token_len", "discrete_state_input")


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint, recognised.

    Attributes:
        place: the Orbax folder or the safetensors file.
        is_orbax: which of the two.
        arrays: by the names of the layout's rows.
        side: the layout and the model.
        assumed: settings that neither weights nor files beside them say.
        stats: every norm_stats.json, by its path below `assets`.
    """

    place: epath.Path
    is_orbax: bool
    arrays: Mapping[str, LazyArray]
    side: Side
    assumed: tuple[str, ...]
    stats: Mapping[str, bytes]


def open_source(
    checkpoint_dir: str | os.PathLike[str],
    config_name: str | None = None,
    lora_scale: float | None = None,
) -> Source:
    """Opens a checkpoint, in any format and layout.

    Args:
        checkpoint_dir: see `convert.reading.open_checkpoint`.
        config_name: the openpi config that it is expected to be of.
        lora_scale: alpha / rank of its attention's adapters. None: what a config says, or 1.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: it is no checkpoint of a π0 or π0.5 model, or not of the config's.
    """
    place, opener = locate(checkpoint_dir)
    is_orbax = opener is open_orbax
    flat = flatten(open_checkpoint(checkpoint_dir))
    folders = (place, place.parent) if is_orbax else (place.parent,)
    told: dict[str, Any] = {}
    for folder in folders:
        told = told or config_file.read(folder)
    if config_name is not None:
        told = _confirmed(told, config_name)
    found = recognise({name: array.shape for name, array in flat.items()}, told)
    config = _scaled(found.config, lora_scale)
    if config.has_lora and not is_orbax:
        peft.check(place.parent / ADAPTER_FOLDER, config)
    stats = assets.find(place)
    if not is_orbax and not stats and (place.parent / PREPROCESSOR_FILE).exists():
        lerobots = norm_stats_of(Path(place.parent))
        stats = {} if lerobots is None else {f"lerobot/{assets.FILE}": assets.to_file(lerobots)}
    return Source(
        place=place,
        is_orbax=is_orbax,
        arrays=by_row(renamed(flat, found.layout), found.layout),
        side=Side(found.layout, config),
        assumed=found.assumed + _assumed_scale(config, told, lora_scale),
        stats=stats,
    )


def _confirmed(told: Mapping[str, Any], config_name: str) -> dict[str, Any]:
    """What a config of openpi says, which must be what files beside the weights say.

    Raises:
        ValueError: there is no such config, or they say different things.
    """
    named = openpi_config(config_name)
    says = {name: getattr(named, name) for name in (*_NAMED, *_OPEN)}
    wrong = [
        f"{name}: expected {says[name]!r}, got {told[name]!r}"
        for name in says
        if name in told and _resolved(name, told[name]) != _resolved(name, says[name])
    ]
    if wrong:
        raise ValueError(
            "\n".join(
                [f"config_name: {config_name!r} is not the config beside the weights", *wrong]
            )
        )
    return says


def _resolved(name: str, value: Any) -> Any:
    if name in _EXPERTS:
        return gemma_variant(value)
    return vision_variant(value) if name == "vision_variant" else value


def _assumed_scale(
    config: Pi0Config, told: Mapping[str, Any], scale: float | None
) -> tuple[str, ...]:
    """Whether alpha was taken to be the rank of adapters, since nothing says it."""
    variants = [getattr(config, name) for name in _EXPERTS if name not in told]
    unnamed = [v for v in variants if not isinstance(v, str) and v.lora is not None]
    return ("lora_scale",) if unnamed and scale is None else ()


def _scaled(config: Pi0Config, scale: float | None) -> Pi0Config:
    if scale is None:
        return config
    if not math.isfinite(scale):
        raise ValueError(f"lora_scale: expected a finite number, got {scale}")
    if not config.has_lora:
        raise ValueError(f"lora_scale: expected none for a model without adapters, got {scale}")
    changed = {}
    for name in _EXPERTS:
        variant = gemma_variant(getattr(config, name))
        if variant.lora is not None:
            lora = LoraVariant(rank=variant.lora.rank, alpha=scale * variant.lora.rank)
            changed[name] = variant_name(dataclasses.replace(variant, lora=lora))
    return dataclasses.replace(config, **changed)
