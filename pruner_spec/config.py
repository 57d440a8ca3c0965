"""What a π0 or π0.5 model is: sizes by variant name, and the settings of its token pruner.

The field names and defaults of `Pi0Config` are openpi's, so that an openpi user's config reads the
same here; the `token_prune_*` fields are the names users of the published LightVLA ports know.
"""

import dataclasses
import math
import numbers
from typing import Any, Literal, Self

IMAGE_SIZE = 224
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
PALIGEMMA_VOCAB_SIZE = 257_152

DTYPES = ("bfloat16", "float32", "float64")
PruneScope = Literal["camera", "joint"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraVariant:
    """Low-rank adapters beside every kernel of an expert's attention and MLP.

    Attributes:
        rank: of every adapter; in the attention, of every head's.
        alpha: the attention's adapters count alpha / rank. The MLP's count 1, as in openpi.
    """

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        """What the attention's adapters are multiplied by."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaVariant:
    """Sizes of one Gemma expert, and its adapters if it has any."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int = PALIGEMMA_VOCAB_SIZE
    lora: LoraVariant | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionVariant:
    """Sizes of a SigLIP vision tower."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def num_patches(self) -> int:
        """Patches a camera: the convolution has stride `patch_size` and no padding."""
        return (IMAGE_SIZE // self.patch_size) ** 2


# `tiny` and `tiny_expert` are for tests: every size differs from every other, and heads times
# head_dim is not the width, so that a swapped axis cannot hide.
_GEMMA_VARIANTS = {
    "gemma_2b": GemmaVariant(
        width=2048, depth=18, mlp_dim=16_384, num_heads=8, num_kv_heads=1, head_dim=256
    ),
    "gemma_300m": GemmaVariant(
        width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256
    ),
    "dummy": GemmaVariant(width=64, depth=4, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16),
    "tiny": GemmaVariant(
        width=72, depth=3, mlp_dim=136, num_heads=6, num_kv_heads=2, head_dim=20, vocab_size=1024
    ),
    "tiny_expert": GemmaVariant(
        width=56, depth=3, mlp_dim=104, num_heads=6, num_kv_heads=2, head_dim=20, vocab_size=1024
    ),
}

# As openpi names them. Those of openpi have alpha = rank, the tests' have not.
_LORA_VARIANTS = {
    "gemma_2b": LoraVariant(rank=16, alpha=16.0),
    "gemma_300m": LoraVariant(rank=32, alpha=32.0),
    "tiny": LoraVariant(rank=9, alpha=4.5),
    "tiny_expert": LoraVariant(rank=14, alpha=3.5),
}

GEMMA_VARIANTS = _GEMMA_VARIANTS | {
    f"{name}_lora": dataclasses.replace(_GEMMA_VARIANTS[name], lora=lora)
    for name, lora in _LORA_VARIANTS.items()
}

_VISION_TOWERS = {
    "So400m": {"width": 1152, "depth": 27, "mlp_dim": 4304, "num_heads": 16},
    "tiny": {"width": 48, "depth": 5, "mlp_dim": 88, "num_heads": 4},
}


def gemma_variant(name: str | GemmaVariant, field: str = "variant") -> GemmaVariant:
    """The sizes of a Gemma variant, from its name; sizes are given back as they are.

    Raises:
        ValueError: there is no such variant; names the field it was given for.
    """
    if isinstance(name, GemmaVariant):
        return name
    if name not in GEMMA_VARIANTS:
        raise ValueError(f"{field}: expected one of {sorted(GEMMA_VARIANTS)}, got {name!r}")
    return GEMMA_VARIANTS[name]


def vision_variant(name: str | VisionVariant) -> VisionVariant:
    """The sizes of a vision tower from "<tower>/<patch size>", as in `So400m/14`.

    Sizes are given back as they are.

    Raises:
        ValueError: the tower is unknown, or the patch size is not a number from 1 to 224.
    """
    if isinstance(name, VisionVariant):
        return name
    tower, _, patch = name.partition("/")
    if tower not in _VISION_TOWERS or not patch.isdecimal():
        raise ValueError(
            f"vision_variant: expected '<tower>/<patch size>' with a tower of "
            f"{sorted(_VISION_TOWERS)}, got {name!r}"
        )
    if not 1 <= int(patch) <= IMAGE_SIZE:
        raise ValueError(f"vision_variant: expected a patch size in 1..{IMAGE_SIZE}, got {name!r}")
    return VisionVariant(**_VISION_TOWERS[tower], patch_size=int(patch))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pi0Config:
    """A π0 (`pi05=False`) or π0.5 (`pi05=True`) model and its token pruner.

    Attributes:
        dtype: dtype of the computation. "bfloat16" follows openpi's mixed rules: see
            `pruner_spec.parameters.parameter_dtype` for what stays in float32.
        paligemma_variant: the prefix expert, which reads images and prompt: a name of
            `GEMMA_VARIANTS`, or its sizes. "gemma_2b_lora" has adapters.
        action_expert_variant: the suffix expert, which denoises actions; likewise.
        vision_variant: the SigLIP tower, "<tower>/<patch size>", or its sizes.
        action_dim: A, numbers in a state or an action after zero-padding.
        action_horizon: H, actions in a chunk.
        max_token_len: L, prompt tokens. None: 200 for π0.5, 48 for π0, as in openpi.
        discrete_state_input: the state is part of the prompt's text. None: as `pi05`.
        token_pruning_enabled: visual tokens are pruned as in LightVLA (arXiv 2509.12594).
        token_prune_noise_scale: scale of the uniform noise on the scores in training.
        token_prune_keep_tokens: K, patches kept a camera. None: the implicit union of votes.
        token_prune_keep_ratio: the same as a share, ceil(ratio * N) a camera.
        token_prune_scope: "camera" scores every camera on its own; "joint" pools the patches of
            all cameras, as LightVLA does. In a pool, a budget of K a camera is K times the number
            of valid cameras in all.
        token_prune_min_keep: an implicit union smaller than this (a camera, or a pool) is
            filled up to it.
    """

    dtype: str = "bfloat16"
    paligemma_variant: str | GemmaVariant = "gemma_2b"
    action_expert_variant: str | GemmaVariant = "gemma_300m"
    vision_variant: str | VisionVariant = "So400m/14"

    action_dim: int = 32
    action_horizon: int = 50
    max_token_len: int = None  # type: ignore[assignment]  # resolved in __post_init__
    pi05: bool = False
    discrete_state_input: bool = None  # type: ignore[assignment]  # resolved in __post_init__

    token_pruning_enabled: bool = False
    token_prune_noise_scale: float = 0.0
    token_prune_keep_tokens: int | None = None
    token_prune_keep_ratio: float | None = None
    token_prune_scope: PruneScope = "camera"
    token_prune_min_keep: int = 1

    def __post_init__(self) -> None:
        if self.max_token_len is None:
            object.__setattr__(self, "max_token_len", 200 if self.pi05 else 48)
        if self.discrete_state_input is None:
            object.__setattr__(self, "discrete_state_input", self.pi05)
        self._check_model()
        self._check_pruning()

    @classmethod
    def from_fields(cls, config: Any) -> Self:
        """From any object that has some of these fields as attributes, such as openpi's config.

        Missing fields get their defaults, and so do dtypes that openpi leaves unset (None).
        """
        names = [field.name for field in dataclasses.fields(cls)]
        found = {name: getattr(config, name) for name in names if hasattr(config, name)}
        if found.get("dtype", "") is None:
            del found["dtype"]
        return cls(**found)

    @property
    def vision(self) -> VisionVariant:
        return vision_variant(self.vision_variant)

    @property
    def paligemma(self) -> GemmaVariant:
        return gemma_variant(self.paligemma_variant, "paligemma_variant")

    @property
    def action_expert(self) -> GemmaVariant:
        return gemma_variant(self.action_expert_variant, "action_expert_variant")

    @property
    def has_lora(self) -> bool:
        """Whether either expert has adapters."""
        return self.paligemma.lora is not None or self.action_expert.lora is not None

    def without_lora(self) -> Self:
        """The same model without adapters, as it is once they are merged into its weights."""
        return dataclasses.replace(
            self,
            paligemma_variant=_without_lora(self.paligemma_variant),
            action_expert_variant=_without_lora(self.action_expert_variant),
        )

    @property
    def suffix_length(self) -> int:
        """Tokens of the action expert: the actions, and in π0 a state token before them."""
        return self.action_horizon + (0 if self.pi05 else 1)

    @property
    def keep_budget(self) -> int | None:
        """K, patches kept a camera; None for the implicit union of votes."""
        if self.token_prune_keep_ratio is not None:
            return math.ceil(self.token_prune_keep_ratio * self.vision.num_patches)
        return self.token_prune_keep_tokens

    @property
    def prunes_at_inference(self) -> bool:
        """False also for a budget that holds every patch: selecting would change nothing."""
        budget = self.keep_budget
        return self.token_pruning_enabled and (budget is None or budget < self.vision.num_patches)

    def _check_model(self) -> None:
        for name in ("pi05", "discrete_state_input", "token_pruning_enabled"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {DTYPES}, got {self.dtype!r}")
        _ = self.vision  # unknown variants raise
        for name in ("action_dim", "action_horizon", "max_token_len"):
            _check_at_least(name, getattr(self, name), 1)
        for name in ("depth", "num_heads", "num_kv_heads", "head_dim"):
            prefix, suffix = getattr(self.paligemma, name), getattr(self.action_expert, name)
            if prefix != suffix:
                raise ValueError(
                    f"action_expert_variant: the experts attend jointly, so expected the {name} "
                    f"of {self.paligemma_variant!r} ({prefix}), got {self.action_expert_variant!r} "
                    f"with {suffix}"
                )

    def _check_pruning(self) -> None:
        patches = self.vision.num_patches
        scale, ratio = self.token_prune_noise_scale, self.token_prune_keep_ratio
        if not (_is_number(scale) and math.isfinite(scale) and scale >= 0):
            raise ValueError(f"token_prune_noise_scale: expected a number >= 0, got {scale!r}")
        if self.token_prune_scope not in ("camera", "joint"):
            raise ValueError(
                f"token_prune_scope: expected 'camera' or 'joint', got {self.token_prune_scope!r}"
            )
        if ratio is not None and not (_is_number(ratio) and 0 < ratio <= 1):
            raise ValueError(f"token_prune_keep_ratio: expected 0 < ratio <= 1, got {ratio!r}")
        if ratio is not None and self.token_prune_keep_tokens is not None:
            raise ValueError(
                "token_prune_keep_ratio: expected at most one budget, got both "
                f"token_prune_keep_tokens={self.token_prune_keep_tokens!r} and "
                f"token_prune_keep_ratio={ratio!r}"
            )
        if self.token_prune_keep_tokens is not None:
            _check_at_least("token_prune_keep_tokens", self.token_prune_keep_tokens, 1)
            if self.token_prune_keep_tokens > patches:
                raise ValueError(
                    f"token_prune_keep_tokens: expected at most the {patches} patches of a camera, "
                    f"got {self.token_prune_keep_tokens}"
                )
        _check_at_least("token_prune_min_keep", self.token_prune_min_keep, 1)
        most = patches if self.keep_budget is None else self.keep_budget
        if self.token_prune_scope == "joint":
            most *= len(CAMERAS)
        if self.token_prune_min_keep > most:
            raise ValueError(
                f"token_prune_min_keep: expected at most the {most} patches that can be kept, "
                f"got {self.token_prune_min_keep}"
            )


def variant_name(variant: GemmaVariant) -> str | GemmaVariant:
    """The name of a variant's sizes, or the sizes themselves where they have none."""
    return next((name for name, each in GEMMA_VARIANTS.items() if each == variant), variant)


def _without_lora(variant: str | GemmaVariant) -> str | GemmaVariant:
    sizes = gemma_variant(variant)
    if sizes.lora is None:
        return variant
    return variant_name(dataclasses.replace(sizes, lora=None))


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check_at_least(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
