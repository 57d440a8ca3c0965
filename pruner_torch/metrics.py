"""What a training step reports: measured a sample each, summed up over the whole batch.

The two are apart, since a batch may be computed in parts and by several devices.

Dimension letters: B batch, P pools (see `Pi0.pools`), C cameras, N patches.
"""

import dataclasses
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pruner_torch import kernels_plain
from pruner_torch.diagnostics import diagnose
from pruner_torch.pruner import PrunedPatches
from pruner_torch.recomputation import optimized

if TYPE_CHECKING:
    from pruner_torch.pi0 import Encoded, LossTerms, Pi0


@dataclasses.dataclass(frozen=True)
class Pruning:
    """How a batch's patches were pruned.

    Attributes:
        patches: those of cameras that are there.
        kept: of them, what the model would keep if it were deployed: without noise.
        noisy_kept: how many different ones the step saw.
        task_length: valid tokens of the prompt.
        pools: which pools have any patch.
        top_votes_share, score_gap, queries_spread, patches_spread: see `Diagnostics`, of each pool.
    """

    patches: Int[Tensor, "B"]
    kept: Int[Tensor, "B"]
    noisy_kept: Int[Tensor, "B"]
    task_length: Int[Tensor, "B"]
    pools: Bool[Tensor, "B P"]
    top_votes_share: Float[Tensor, "B P"]
    score_gap: Float[Tensor, "B P"]
    queries_spread: Float[Tensor, "B P"]
    patches_spread: Float[Tensor, "B P"]


@dataclasses.dataclass(frozen=True)
class Measures:
    """What is measured of a batch.

    Attributes:
        loss: of each sample.
        pruning: None in a model that does not prune.
    """

    loss: Float[Tensor, "B"]
    pruning: Pruning | None


def measure(model: "Pi0", terms: "LossTerms") -> Measures:
    """Of a batch whose loss was computed; nothing here has a gradient but the loss."""
    loss = terms.loss.mean(dim=-1)
    if terms.pruned is None:
        return Measures(loss=loss, pruning=None)
    with torch.no_grad():
        pruning = optimized(_pruning, model.compiled_training)(model, terms.encoded, terms.pruned)
    return Measures(loss=loss, pruning=pruning)


def _pruning(model: "Pi0", encoded: "Encoded", pruned: PrunedPatches) -> Pruning:
    batch, _, patches = encoded.patches.shape[:3]
    pools = model.pools(encoded)
    found = diagnose(*pools)
    by_pool = {
        name: getattr(found, name).reshape(batch, -1)
        for name in ("top_votes_share", "score_gap", "queries_spread", "patches_spread")
    }
    return Pruning(
        patches=encoded.camera_mask.sum(dim=-1) * patches,
        kept=model.select(encoded, kernels_plain).kept.sum(dim=-1),
        noisy_kept=_different(pruned),
        task_length=encoded.prompt_mask.sum(dim=-1),
        pools=pools[3].any(dim=-1).reshape(batch, -1),
        **by_pool,
    )


def summarize(measures: Measures) -> dict[str, Float[Tensor, ""]]:
    """The metrics of a batch, by name."""
    metrics = {"loss": measures.loss.mean()}
    if measures.pruning is None:
        return metrics
    pruning, dtype = measures.pruning, measures.loss.dtype
    for prefix, counts in (("", pruning.kept), ("noisy_", pruning.noisy_kept)):
        kept = counts.to(dtype)
        metrics |= {
            f"prune/{prefix}kept_tokens_mean": kept.mean(),
            f"prune/{prefix}kept_tokens_min": kept.min(),
            f"prune/{prefix}kept_tokens_max": kept.max(),
            f"prune/{prefix}kept_ratio": kept.sum() / pruning.patches.sum().clamp(min=1),
        }
    weight = pruning.pools.to(dtype)
    weight = weight / weight.sum().clamp(min=1)
    return metrics | {
        "prune/argmax_top1_share": (pruning.top_votes_share * weight).sum(),
        "prune/score_top1_gap": (pruning.score_gap * weight).sum(),
        "prune/queries_spread": (pruning.queries_spread * weight).sum(),
        "prune/patches_spread": (pruning.patches_spread * weight).sum(),
        "prune/task_valid_len": pruning.task_length.to(dtype).mean(),
    }


def _different(pruned: PrunedPatches) -> Int[Tensor, "B"]:
    """How many different patches there are among the valid ones."""
    seen = torch.zeros_like(pruned.index).scatter_add(-1, pruned.index, pruned.valid.long())
    return (seen > 0).sum(dim=-1)
