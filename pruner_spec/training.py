"""What a training step is, apart from the framework: its settings, its batch, its random numbers.

Step s of a run draws, for the sample at place i of the global batch, from the streams of
(seed, s, i): noise, time, the pruner's noise, the augmentation. Nothing else is random, so that
neither the backend nor the split over devices or accumulated parts shows in the result.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from pruner_spec.config import CAMERAS, Pi0Config
from pruner_spec.flow import pruner_noise_scale
from pruner_spec.optimization import AdamW, CosineDecaySchedule
from pruner_spec.parameters import parameter_table

NoiseSchedule = Literal["linear", "constant", "none"]

GradientCheckpointing = Literal["none", "products", "full"]
"""What is computed again in the backward pass, to save memory: nothing; all but the results of
matrix products and of attention, which are most of the work; or every layer from its input."""

# Names of adapters: a base model's weights lack them.
ADAPTERS = r"\.lora\.[ab]$"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What a backend needs to know of a run.

    Attributes:
        seed: of all random numbers.
        num_train_steps: of the run; the pruner's noise ends with it.
        optimizer: AdamW's settings.
        schedule: of the learning rate.
        ema_decay: of the average of the parameters; None for no average.
        freeze: regular expressions; a parameter in whose name (ours) one is found is not trained.
        weight_missing: the same for those that the initial weights may lack, and
        weight_ignored: for those that are not taken from them: `initial_parameters` gives both.
        augment: whether images are augmented.
        accumulation: parts in which a batch is computed one after the other.
        gradient_checkpointing: what is computed again in the backward pass.
        noise_schedule: of the pruner's noise.
    """

    seed: int = 42
    num_train_steps: int = 30_000
    optimizer: AdamW = dataclasses.field(default_factory=AdamW)
    schedule: CosineDecaySchedule = dataclasses.field(default_factory=CosineDecaySchedule)
    ema_decay: float | None = 0.99
    freeze: Sequence[str] = ()
    weight_missing: tuple[str, ...] = (ADAPTERS,)
    weight_ignored: tuple[str, ...] = ()
    augment: bool = True
    accumulation: int = 1
    gradient_checkpointing: GradientCheckpointing = "none"
    noise_schedule: NoiseSchedule = "linear"

    def __post_init__(self) -> None:
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: expected 0 <= ema_decay < 1, got {self.ema_decay}")
        if self.gradient_checkpointing not in (known := get_args(GradientCheckpointing)):
            raise ValueError(
                f"gradient_checkpointing: expected one of {', '.join(known)}, got "
                f"{self.gradient_checkpointing!r}"
            )
        if self.accumulation < 1:
            raise ValueError(f"accumulation: expected at least 1, got {self.accumulation}")
        for field in ("freeze", "weight_missing", "weight_ignored"):
            _check_patterns(field, getattr(self, field))

    def is_trained(self, name: str) -> bool:
        """Whether a parameter, by our name, changes."""
        return not any(re.search(pattern, name) for pattern in self.freeze)

    def noise_scale(self, step: int) -> float:
        """Of the pruner's noise, in a model that prunes."""
        if self.noise_schedule == "linear":
            return pruner_noise_scale(step, self.num_train_steps)
        return 1.0 if self.noise_schedule == "constant" else 0.0


def _check_patterns(field: str, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{field}: expected regular expressions, got {pattern!r}: {error}"
            ) from error


@dataclasses.dataclass(frozen=True)
class Batch:
    """The samples of a step, or one process's share of them.

    Attributes:
        images: uint8 or float in [-1, 1], [B, 224, 224, 3] a camera.
        image_masks: bool [B] a camera.
        state: [B, A], normalised and padded.
        tokenized_prompt: int32 [B, L].
        tokenized_prompt_mask: bool [B, L].
        actions: [B, H, A], normalised and padded.
        places: int [B], of the samples in the global batch.
    """

    images: dict[str, Any]
    image_masks: dict[str, Any]
    state: Any
    tokenized_prompt: Any
    tokenized_prompt_mask: Any
    actions: Any
    places: Any


def master_dtype(config: Pi0Config) -> str:
    """The dtype of all parameters and moments while a model is trained, whatever it computes in."""
    return "float64" if config.dtype == "float64" else "float32"


def pruner_noise_shape(config: Pi0Config) -> tuple[int, ...]:
    """The shape of a sample's noise on the scores: a matrix a pool."""
    patches = config.vision.num_patches
    if config.token_prune_scope == "joint":
        return (len(CAMERAS) * patches, len(CAMERAS) * patches)
    return (len(CAMERAS), patches, patches)


def trained_names(config: Pi0Config, settings: TrainingSettings) -> tuple[str, ...]:
    """The parameters that change, in their order in the model.

    Raises:
        ValueError: none does.
    """
    names = tuple(name for name in parameter_table(config) if settings.is_trained(name))
    if not names:
        raise ValueError(
            f"freeze: expected to leave some parameter to train, got {list(settings.freeze)}"
        )
    return names


def check_divisible(batch: Batch, accumulation: int, devices: int = 1) -> None:
    """Raises ValueError unless a process's share of a batch can be cut into equal parts.

    Args:
        batch: the share.
        accumulation: parts that are computed one after the other.
        devices: of the process.
    """
    if (size := len(batch.places)) % (accumulation * devices) or not size:
        raise ValueError(
            f"batch: expected a number of samples that accumulation={accumulation} times {devices} "
            f"device{'s' if devices > 1 else ''} divides, got {size}"
        )


def lora_freeze(paligemma: bool, action_expert: bool) -> tuple[str, ...]:
    """Patterns that freeze what openpi's `get_freeze_filter` freezes: all but adapters of an expert
    that has them. The vision tower and the projections are trained on.

    Args:
        paligemma: whether the prefix expert has adapters.
        action_expert: whether the suffix expert has.
    """
    frozen = []
    if paligemma:
        frozen.append(r"^gemma\.(embedder|language)\b(?!.*\.lora\.[ab]$)")
    if action_expert:
        frozen.append(r"^gemma\.action\b(?!.*\.lora\.[ab]$)")
    return tuple(frozen)


@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run needs to go on, by our names, layers stacked: arrays of NumPy, or what it can
    read as such.

    Any backend's trainer gives one and takes one: a run that was begun in JAX is finished in
    PyTorch.

    Attributes:
        step: how many steps were made.
        parameters: every parameter of the model.
        average: the running average of every parameter, which of a frozen one is itself; None for
            a run without.
        first, second: Adam's moments, of trained parameters alone.
    """

    step: int
    parameters: Mapping[str, Any]
    average: Mapping[str, Any] | None
    first: Mapping[str, Any]
    second: Mapping[str, Any]

    def check(self, config: Pi0Config, settings: TrainingSettings) -> None:
        """Raises ValueError unless it is of a run of this model with these settings."""
        if (self.average is None) != (settings.ema_decay is None):
            wanted = "none" if settings.ema_decay is None else f"one, of {settings.ema_decay}"
            found = "none" if self.average is None else "one"
            raise ValueError(f"average: expected {wanted}, got {found}")
        every = {name: each.stacked_shape for name, each in parameter_table(config).items()}
        trained = {name: every[name] for name in trained_names(config, settings)}
        for field, expected in (
            ("parameters", every),
            ("average", every if self.average is not None else {}),
            ("first", trained),
            ("second", trained),
        ):
            given = {name: np.shape(array) for name, array in (getattr(self, field) or {}).items()}
            if differing := sorted(expected.items() ^ given.items()):
                raise ValueError(
                    f"{field}: expected the {len(expected)} arrays of this run, got {len(given)}; "
                    f"only one of the two has {differing[:5]}"
                )
