"""What model a checkpoint is of, from the names and shapes of its tensors.

Shapes say nearly everything. They do not say how long an action chunk is, and only openpi's JAX
layout and adapters say how many heads there are: where it matters, sizes that are known by name
are recognised, and others have to be told (our converter writes them into `config.json`).
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pruner_spec.config import (
    GEMMA_VARIANTS,
    IMAGE_SIZE,
    GemmaVariant,
    LoraVariant,
    Pi0Config,
    VisionVariant,
    gemma_variant,
    vision_variant,
)
from pruner_spec.layout import Layout, Shape, by_row, check, detect, renamed
from pruner_spec.layout_row import Row, axes
from pruner_spec.openpi_configs import OPENPI_CONFIGS

_EXPERTS = {"paligemma_variant": "gemma.language", "action_expert_variant": "gemma.action"}
_TOWERS = ("So400m", "tiny")


@dataclasses.dataclass(frozen=True)
class Recognised:
    """A checkpoint's model.

    Attributes:
        layout: how its tensors are named and laid out.
        config: of the model.
        assumed: settings that nothing said, which therefore have their defaults.
    """

    layout: Layout
    config: Pi0Config
    assumed: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Family:
    """What the stored shape of a parameter family tells: the shape of a layer's array, how many
    layers there are, and the sizes of the axes that stand alone in the stored tensor."""

    shape: Shape
    layers: int
    axes: Mapping[str, int]


def recognise(shapes: Mapping[str, Shape], told: Mapping[str, Any] | None = None) -> Recognised:
    """The model that these tensors are of, and that they are all of it.

    Args:
        shapes: by name, as `layout.flatten` names them.
        told: fields of `Pi0Config` from elsewhere, such as a config file beside the weights. Only
            what the shapes leave open is taken from it; what they contradict is an error.

    Raises:
        ValueError: the tensors are not those of a π0 or π0.5 model; lists every missing, extra and
            misshapen one. Or `told` says something else than the shapes.
    """
    told = {} if told is None else dict(told)
    if empty := sorted(name for name, shape in shapes.items() if 0 in shape):
        raise ValueError(f"expected weights, got arrays without numbers: {empty}")
    layout = detect(shapes)
    stored = renamed(shapes, layout)
    families = dict(_families(by_row(stored, layout), layout))
    _refuse_fast(families)
    missing = [name for name in _needed() if name not in families]
    if missing:
        check(stored, layout, _nearest(stored, layout))
        raise AssertionError(f"{missing} are missing, and no difference was found")
    sizes = _sizes(families, told)
    _contradict(sizes, told)
    free = ("action_horizon", "max_token_len", "discrete_state_input")
    config = Pi0Config(**sizes, **{name: told[name] for name in free if told.get(name) is not None})
    check(stored, layout, config)
    return Recognised(layout, config, tuple(name for name in free if told.get(name) is None))


def _needed() -> Iterator[str]:
    """The families from which sizes are read."""
    yield from ("vision.patch_embedding.kernel", "vision.blocks.mlp.up.kernel")
    yield from ("vision.blocks.attention.query.kernel", "gemma.embedder.embedding")
    yield "action_in_proj.kernel"
    for expert in _EXPERTS.values():
        for kernel in ("attention.query", "attention.key", "mlp.gate"):
            yield f"{expert}.layers.{kernel}.kernel"


def _families(stored: Mapping[str, Shape], layout: Layout) -> Iterator[tuple[str, _Family]]:
    """Each parameter family that is there, by our name."""
    layers = _layer_counts(stored)
    for row in layout.rows:
        shape = stored.get(row.theirs.format(layer=0))
        if shape is not None and len(shape) == len(axes(row.sides[0])):
            family = _family(row, shape, layers.get(row.theirs, 1))
            if family is not None:
                yield from ((name, family) for name in row.ours)


def _layer_counts(stored: Mapping[str, Shape]) -> dict[str, int]:
    """How many layers there are of each name with a layer's number in it, by the highest number."""
    counts: dict[str, int] = {}
    for name in stored:
        if number := re.search(r"(?<=\.)\d+(?=\.)", name):
            family = f"{name[: number.start()]}{{layer}}{name[number.end() :]}"
            # A number above that of all tensors is no count: too many are missing either way.
            layer = min(int(number[0]), len(stored))
            counts[family] = max(counts.get(family, 0), layer + 1)
    return counts


def _family(row: Row, shape: Shape, layers: int) -> _Family | None:
    """None where a group of the stored axes cannot be told apart."""
    theirs, ours = row.sides
    sizes = dict(zip(axes(theirs), shape, strict=True))
    found = []
    for axis in axes(ours):
        letters = re.findall(r"\w+", axis)
        if axis not in sizes and not all(letter in sizes for letter in letters):
            return None
        found.append(math.prod(sizes[letter] for letter in letters if letter in sizes))
    found = [size for axis, size in zip(axes(ours), found, strict=True) if axis not in ("l", "two")]
    return _Family(tuple(found), sizes.get("l", layers), sizes)


def _refuse_fast(families: Mapping[str, _Family]) -> None:
    if not any(name.startswith("gemma.action.") for name in families):
        raise ValueError(
            "expected the weights of a π0 or π0.5 model, got none of an action expert's: "
            "these may be of π0-FAST or of PaliGemma, which are not supported"
        )


def _nearest(stored: Mapping[str, Shape], layout: Layout) -> Pi0Config:
    """Of openpi's models the one that has the most of these tensors."""

    def alike(config: Pi0Config) -> int:
        return len(layout.shapes(config).items() & stored.items())

    return max(dict.fromkeys(OPENPI_CONFIGS.values()), key=alike)


def _sizes(families: Mapping[str, _Family], told: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the config that shapes say."""
    votes = {
        pi05: sum(name.startswith(marks) for name in families)
        for pi05, marks in (
            (True, ("time_mlp_", "gemma.action.final_norm.modulation")),
            (False, ("state_proj", "action_time_mlp_", "gemma.action.final_norm.scale")),
        )
    }
    sizes: dict[str, Any] = {
        "pi05": votes[True] >= votes[False],
        "action_dim": families["action_in_proj.kernel"].shape[0],
        "vision_variant": _vision(families, told.get("vision_variant")),
    }
    for field, expert in _EXPERTS.items():
        sizes[field] = _expert(families, expert, field, told.get(field))
    return sizes


def _vision(families: Mapping[str, _Family], told: Any) -> str | VisionVariant:
    up = families["vision.blocks.mlp.up.kernel"]
    patch = max(1, math.isqrt(families["vision.patch_embedding.kernel"].shape[0] // 3))
    found = {"width": up.shape[0], "depth": up.layers, "mlp_dim": up.shape[1], "patch_size": patch}
    found |= _heads(families, "vision.blocks.attention.query.kernel", {"num_heads": "k"})
    named = [f"{tower}/{patch}" for tower in _TOWERS] if 1 <= patch <= IMAGE_SIZE else []
    candidates = ([] if told is None else [told]) + named
    for candidate in candidates:
        if found.items() <= dataclasses.asdict(vision_variant(candidate)).items():
            return candidate
    _want_heads(found, ("num_heads",), "vision_variant", told)
    return VisionVariant(**found)


def _expert(
    families: Mapping[str, _Family], expert: str, field: str, told: Any
) -> str | GemmaVariant:
    query, key = (f"{expert}.layers.attention.{name}.kernel" for name in ("query", "key"))
    gate, factor = (f"{expert}.layers.mlp.gate.{name}" for name in ("kernel", "lora.a"))
    rank = families[factor].shape[-1] if factor in families else None
    found = {
        "width": families[query].shape[0],
        "depth": max(
            families[f"{each}.layers.mlp.gate.kernel"].layers for each in _EXPERTS.values()
        ),
        "mlp_dim": families[gate].shape[1],
        "vocab_size": families["gemma.embedder.embedding"].shape[0],
        "queries": families[query].shape[1],
        "keys": families[key].shape[1],
        "rank": rank,
    }
    found |= _heads(families, query, {"num_heads": "k"}) | _heads(
        families, key, {"num_kv_heads": "g"}
    )
    for candidate in ([] if told is None else [told]) + list(GEMMA_VARIANTS):
        if found.items() <= _expert_sizes(gemma_variant(candidate, field)).items():
            return candidate
    _want_heads(found, ("num_heads", "num_kv_heads"), field, told)
    return GemmaVariant(
        width=found["width"],
        depth=found["depth"],
        mlp_dim=found["mlp_dim"],
        num_heads=found["num_heads"],
        num_kv_heads=found["num_kv_heads"],
        head_dim=found["queries"] // found["num_heads"],
        vocab_size=found["vocab_size"],
        lora=None if rank is None else LoraVariant(rank=rank, alpha=float(rank)),
    )


def _expert_sizes(variant: GemmaVariant) -> dict[str, Any]:
    """A variant's sizes as a checkpoint shows them."""
    return dataclasses.asdict(variant) | {
        "queries": variant.num_heads * variant.head_dim,
        "keys": variant.num_kv_heads * variant.head_dim,
        "rank": None if variant.lora is None else variant.lora.rank,
        "lora": None,
    }


def _heads(families: Mapping[str, _Family], name: str, fields: dict[str, str]) -> dict[str, Any]:
    """The numbers of heads that the stored tensor has an axis for."""
    sizes = families[name].axes
    return {field: sizes[letter] for field, letter in fields.items() if letter in sizes}


def _want_heads(found: Mapping[str, Any], names: tuple[str, ...], field: str, told: Any) -> None:
    if any(name not in found for name in names):
        raise ValueError(
            f"{field}: expected sizes that are known by name, or a config file beside the weights "
            f"that says {' and '.join(names)} of these; got {found}"
            + ("" if told is None else f", and a config that says {told!r}")
        )


def _contradict(sizes: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """Raises a ValueError where what was told is not what was found."""
    resolve = {"vision_variant": vision_variant} | dict.fromkeys(_EXPERTS, gemma_variant)
    wrong = [
        f"{name}: expected {told[name]!r} as it was told, got {size!r}"
        for name, size in sizes.items()
        if told.get(name) is not None
        and resolve.get(name, lambda same: same)(told[name])
        != resolve.get(name, lambda same: same)(size)
    ]
    if wrong:
        raise ValueError("\n".join(["the checkpoint is of another model than was told", *wrong]))
