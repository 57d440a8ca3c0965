"""What `pruner bench` measures: the sizes of a call, and the inputs that have them."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from pruner_spec.config import CAMERAS, IMAGE_SIZE, Pi0Config
from pruner_spec.flow import euler_step
from pruner_spec.inference import InferenceSettings
from pruner_spec.observation import Observation

UNPRUNED, IMPLICIT = "none", "implicit"

MODELS = {
    "pi05": Pi0Config(pi05=True),
    "pi0": Pi0Config(),
    "tiny": Pi0Config(
        pi05=True,
        paligemma_variant="tiny",
        action_expert_variant="tiny_expert",
        vision_variant="tiny/14",
    ),
}
_TOKEN = 7  # any that a vocabulary has


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """The sizes of a call.

    Attributes:
        cameras: that there are; the others are masked.
        prompt: tokens of it; the rest, to the config's length, is padding.
        keep: "none", "implicit", or the budget a camera.
        batch: samples.
        horizon: actions in a chunk.
        num_steps: of denoising.
    """

    cameras: int = 3
    prompt: int = 50
    keep: str = UNPRUNED
    batch: int = 1
    horizon: int = 50
    num_steps: int = 10

    @property
    def title(self) -> str:
        """In a line."""
        return (
            f"{self.cameras} cameras, prompt {self.prompt}, keep {self.keep}, batch {self.batch}, "
            f"horizon {self.horizon}, {self.num_steps} steps"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What all cases of a run have in common.

    Attributes:
        config: the model, of `MODELS`.
        dtype: of the computation.
        implicit_kept: patches that the implicit selection keeps at least, in all.
        calls: that are timed, of each kind.
        stages: whether they are timed apart.
        accuracy: whether the actions are held to a float32 reference.
        seed: of the images, the states and the noise.
        checkpoint: whose weights the model has; None for random ones.
        settings: of the fast path.
    """

    config: str = "pi05"
    dtype: str = "bfloat16"
    implicit_kept: int = 60
    calls: int = 100
    stages: bool = True
    accuracy: bool = False
    seed: int = 0
    checkpoint: str | None = None
    settings: InferenceSettings = dataclasses.field(default_factory=InferenceSettings)

    def model_config(self, case: Case) -> Pi0Config:
        """The model of a case.

        Raises:
            ValueError: there is none like it.
        """
        if self.config not in MODELS:
            raise ValueError(f"config: expected one of {', '.join(MODELS)}, got {self.config!r}")
        pruning: dict[str, Any] = {}
        if case.keep == IMPLICIT:
            # Random weights vote for few patches; the union is filled up, as the pruner does
            # with a small one, to what a trained model would keep.
            pruning = {"token_prune_min_keep": math.ceil(self.implicit_kept / case.cameras)}
        elif case.keep != UNPRUNED:
            pruning = {"token_prune_keep_tokens": _integer("keep", case.keep)}
        return dataclasses.replace(
            MODELS[self.config],
            dtype=self.dtype,
            action_horizon=case.horizon,
            token_pruning_enabled=case.keep != UNPRUNED,
            **pruning,
        )


def product(axes: dict[str, str]) -> list[Case]:
    """A case for every choice of one entry an axis, from comma-separated lists.

    What a model is made of (what is kept, the horizon) varies slowest, so that few are made.

    Args:
        axes: a list for every field of `Case`.

    Raises:
        ValueError: an entry is none that the axis knows.
    """
    lists: dict[str, list[Any]] = {name: _entries(name, text) for name, text in axes.items()}
    order = sorted(axes, key=lambda axis: axis not in ("keep", "horizon"))
    chosen = itertools.product(*(lists[name] for name in order))
    return [Case(**dict(zip(order, values, strict=True))) for values in chosen]


def check(cases: Sequence[Case], setup: Setup) -> None:
    """Raises a ValueError for a case that the model cannot have, before anything is measured."""
    if setup.calls < 1:
        raise ValueError(f"calls: expected at least 1, got {setup.calls}")
    if setup.implicit_kept < 1:
        raise ValueError(f"implicit_kept: expected at least 1, got {setup.implicit_kept}")
    for case in cases:
        if not 1 <= case.cameras <= len(CAMERAS):
            raise ValueError(f"cameras: expected 1..{len(CAMERAS)}, got {case.cameras}")
        longest = setup.model_config(case).max_token_len
        if not 1 <= case.prompt <= longest:
            raise ValueError(f"prompt: expected 1..{longest} tokens, got {case.prompt}")
        if case.batch < 1:
            raise ValueError(f"batch: expected at least 1, got {case.batch}")
        euler_step(case.num_steps)


def inputs(case: Case, setup: Setup) -> tuple[Observation, Float[np.ndarray, "B H A"]]:
    """A random observation, images as the bytes that policies hand over, and noise.

    The prompt is one token again and again: every patch then asks the same question and votes for
    the same patch, and what the implicit selection keeps is `Setup.implicit_kept`, on any weights.
    """
    config = setup.model_config(case)
    generator = np.random.default_rng(setup.seed)
    shape = (case.batch, IMAGE_SIZE, IMAGE_SIZE, 3)
    there = np.arange(config.max_token_len) < case.prompt
    mask = np.repeat(there[None], case.batch, axis=0)
    observation = Observation.from_dict(
        {
            "image": {
                camera: generator.integers(0, 256, shape, np.uint8)
                for camera in CAMERAS[: case.cameras]
            },
            "state": 2 * generator.random((case.batch, config.action_dim), dtype=np.float32) - 1,
            "tokenized_prompt": np.where(mask, _TOKEN, 0).astype(np.int32),
            "tokenized_prompt_mask": mask,
        },
        keep_bytes=True,
    )
    chunk = (case.batch, case.horizon, config.action_dim)
    return observation, generator.standard_normal(chunk, dtype=np.float32)


def _entries(axis: str, text: str) -> list[Any]:
    """The entries of a comma-separated list, each once."""
    words = list(dict.fromkeys(word.strip() for word in text.split(",")))
    if axis != "keep":
        return [_integer(axis, word) for word in words]
    for word in words:
        if word not in (UNPRUNED, IMPLICIT):
            _integer(axis, word)
    return words


def _integer(axis: str, word: str) -> int:
    if word.isascii() and word.isdecimal():
        return int(word)
    others = f"'{UNPRUNED}', '{IMPLICIT}' or " if axis == "keep" else ""
    raise ValueError(f"{axis}: expected {others}whole numbers, separated by commas; got {word!r}")
