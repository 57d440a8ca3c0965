"""The tables of cases; every row is run in every dtype its test knows."""

import dataclasses

import numpy as np

from pruner_spec.config import Pi0Config


@dataclasses.dataclass(frozen=True)
class PrunerCase:
    """Inputs of the pruner: sizes, and what is masked.

    Attributes:
        name: of the case.
        batch, patches, task, width: B, N, T, D.
        valid_patches: per sample, how many of the patches are valid; None for all.
        valid_task: the same for the task tokens.
    """

    name: str
    batch: int
    patches: int
    task: int
    width: int = 64
    valid_patches: tuple[int, ...] | None = None
    valid_task: tuple[int, ...] | None = None

    def inputs(self) -> "PrunerInputs":
        """Tokens with a common direction and spread norms, as SigLIP's are."""
        generator = np.random.default_rng(abs(hash_of(self.name)))
        size, count, length, width = self.batch, self.patches, self.task, self.width
        common = 0.5 * generator.standard_normal((size, 1, width))
        norms = 0.4 + 1.6 * generator.random((size, count, 1))
        return PrunerInputs(
            patches=(generator.standard_normal((size, count, width)) + common) * norms,
            task=generator.standard_normal((size, length, width)) + common,
            task_mask=_first(self.valid_task, size, length),
            patch_mask=_first(self.valid_patches, size, count),
            noise=generator.random((size, count, count)),
            cotangent=generator.standard_normal((size, count, width)),
        )


@dataclasses.dataclass(frozen=True)
class PrunerInputs:
    """float64 arrays [B, N, D], [B, T, D], masks, noise [B, N, N] and a cotangent [B, N, D]."""

    patches: np.ndarray
    task: np.ndarray
    task_mask: np.ndarray
    patch_mask: np.ndarray
    noise: np.ndarray
    cotangent: np.ndarray


def hash_of(name: str) -> int:
    """A number of the name, the same in every process."""
    return int.from_bytes(name.encode(), "big") % (2**63)


def _first(counts: tuple[int, ...] | None, batch: int, length: int) -> np.ndarray:
    if counts is None:
        return np.ones((batch, length), dtype=bool)
    return np.arange(length)[None, :] < np.array(counts)[:, None]


PRUNER_CASES = {
    case.name: case
    for case in (
        PrunerCase("one task token", 1, 16, 1),
        PrunerCase("small", 1, 16, 8),
        PrunerCase("batch of 2", 2, 64, 32),
        PrunerCase("short prompts", 3, 49, 20, valid_task=(20, 7, 1)),
        PrunerCase("empty prompt", 2, 36, 12, valid_task=(0, 12)),
        PrunerCase("masked cameras", 4, 48, 16, valid_patches=(48, 36, 16, 0)),
        PrunerCase(
            "all masks", 4, 64, 200, valid_patches=(64, 1, 0, 40), valid_task=(200, 5, 3, 0)
        ),
        PrunerCase("one camera", 1, 256, 48),
        PrunerCase("three cameras", 2, 768, 200, valid_patches=(768, 512), valid_task=(50, 200)),
        PrunerCase("full width", 1, 256, 32, width=2048),
    )
}

BUDGETS = {
    "implicit": {},
    "implicit, at least 12": {"min_keep": 12},
    "5 kept": {"keep_tokens": 5},
    "all kept": {"keep_tokens": 10_000},
}


# The tiny model's variants with adapters, of ranks 9 and 14 and scales 1/2 and 1/4.
TINY_ADAPTED = {"paligemma_variant": "tiny_lora", "action_expert_variant": "tiny_expert_lora"}

# Which of the two experts have adapters.
ADAPTERS = {
    "none": {},
    "both": TINY_ADAPTED,
    "language": {"paligemma_variant": "tiny_lora"},
    "action": {"action_expert_variant": "tiny_expert_lora"},
}


def tiny_config(**settings: object) -> Pi0Config:
    """A π0.5 whose sizes are pairwise distinct: 49 patches a camera, layers of 5 and 3."""
    defaults: dict[str, object] = {
        "dtype": "float64",
        "paligemma_variant": "tiny",
        "action_expert_variant": "tiny_expert",
        "vision_variant": "tiny/32",
        "action_dim": 7,
        "action_horizon": 11,
        "max_token_len": 40,
        "pi05": True,
    }
    return Pi0Config(**(defaults | settings))  # type: ignore[arg-type]


PRUNING = {
    "unpruned": {},
    "implicit": {"token_pruning_enabled": True},
    "implicit, joint": {"token_pruning_enabled": True, "token_prune_scope": "joint"},
    "5 a camera": {"token_pruning_enabled": True, "token_prune_keep_tokens": 5},
    "a quarter, joint": {
        "token_pruning_enabled": True,
        "token_prune_scope": "joint",
        "token_prune_keep_ratio": 0.25,
    },
    "at least 20": {"token_pruning_enabled": True, "token_prune_min_keep": 20},
}

BATCHES = {
    "2, third camera masked in one": {},
    "1": {"lengths": (33,), "present": ((True, True, True),)},
    "1, one camera": {"lengths": (40,), "present": ((True, False, False),)},
    "4, all kinds": {
        "lengths": (1, 40, 17, 0),
        "present": (
            (True, True, True),
            (True, False, True),
            (False, True, False),
            (True, True, False),
        ),
    },
}


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """A model and a batch: rows of the tables above, by name."""

    pi05: bool
    pruning: str
    batch: str
    adapters: str = "none"

    @property
    def name(self) -> str:
        adapted = "" if self.adapters == "none" else "-adapted"
        return f"{'pi05' if self.pi05 else 'pi0'}-{self.pruning}-{self.batch}{adapted}"

    def config(self, dtype: str) -> Pi0Config:
        """The tiny model's config."""
        rows = PRUNING[self.pruning] | ADAPTERS[self.adapters]
        return tiny_config(dtype=dtype, pi05=self.pi05, **rows)


_TWO, _ALL = "2, third camera masked in one", "4, all kinds"

MODEL_CASES = {
    case.name: case
    for case in (
        ModelCase(True, "unpruned", _TWO),
        ModelCase(True, "implicit", _TWO),
        ModelCase(True, "implicit", "1, one camera"),
        ModelCase(True, "implicit, joint", _ALL),
        ModelCase(True, "5 a camera", _ALL),
        ModelCase(True, "a quarter, joint", _TWO),
        ModelCase(True, "at least 20", "1"),
        ModelCase(False, "unpruned", _ALL),
        ModelCase(False, "implicit", _TWO),
        ModelCase(False, "a quarter, joint", "1"),
        ModelCase(True, "unpruned", "1", "both"),
        ModelCase(True, "implicit", _TWO, "both"),
        ModelCase(False, "unpruned", _TWO, "both"),
        ModelCase(False, "5 a camera", "1", "both"),
    )
}

# For what comes before Gemma, or is about padding: an adapter takes tokens one by one.
UNADAPTED_CASES = {name: case for name, case in MODEL_CASES.items() if case.adapters == "none"}
