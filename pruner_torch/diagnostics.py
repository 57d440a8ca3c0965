"""What shows that a selection has collapsed; computed only when asked for.

Dimension letters: B batch, N patches, T task tokens, D width.
"""

import dataclasses

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pruner_torch.layers import wide
from pruner_torch.pruner import all_valid, importance_score, rms_normalize, task_queries, vote


@dataclasses.dataclass(frozen=True)
class Diagnostics:
    """What shows that a selection collapsed, as in `pruner_spec.pruner.Diagnostics`; [B] each."""

    top_votes: Int[Tensor, "B"]
    top_votes_share: Float[Tensor, "B"]
    score_gap: Float[Tensor, "B"]
    patches_spread: Float[Tensor, "B"]
    patches_normalized_spread: Float[Tensor, "B"]
    task_spread: Float[Tensor, "B"]
    task_normalized_spread: Float[Tensor, "B"]
    queries_spread: Float[Tensor, "B"]
    queries_normalized_spread: Float[Tensor, "B"]


def diagnose(
    patches: Float[Tensor, "B N D"],
    task: Float[Tensor, "B T D"],
    task_mask: Bool[Tensor, "B T"] | None = None,
    patch_mask: Bool[Tensor, "B N"] | None = None,
) -> Diagnostics:
    """The diagnostics of a selection by these patches and this task, in `wide` precision."""
    patches, task = (x.to(wide(x.dtype)) for x in (patches, task))
    task_mask = all_valid(task) if task_mask is None else task_mask
    patch_mask = all_valid(patches) if patch_mask is None else patch_mask
    scores = importance_score(patches, task, task_mask)
    queries = task_queries(patches, task, task_mask)
    top_votes = vote(scores, patch_mask).votes.amax(dim=-1).clamp(min=0)
    return Diagnostics(
        top_votes=top_votes,
        top_votes_share=top_votes.to(scores.dtype) / patch_mask.sum(dim=-1).clamp(min=1),
        score_gap=_mean_gap(scores, patch_mask),
        patches_spread=spread(patches, patch_mask),
        patches_normalized_spread=spread(rms_normalize(patches), patch_mask),
        task_spread=spread(task, task_mask),
        task_normalized_spread=spread(rms_normalize(task), task_mask),
        queries_spread=spread(queries, patch_mask),
        queries_normalized_spread=spread(rms_normalize(queries), patch_mask),
    )


def spread(tokens: Float[Tensor, "B N D"], mask: Bool[Tensor, "B N"]) -> Float[Tensor, "B"]:
    """Root mean square distance of the valid tokens from their mean, over their rms norm."""
    weight = mask[:, :, None].to(tokens.dtype)
    count = weight.sum(dim=1, keepdim=True).clamp(min=1)
    mean = (tokens * weight).sum(dim=1, keepdim=True) / count
    distance = ((tokens - mean).square() * weight).sum(dim=(1, 2))
    norm = (tokens.square() * weight).sum(dim=(1, 2))
    return (distance / torch.where(norm > 0, norm, 1.0)).sqrt()


def _mean_gap(
    scores: Float[Tensor, "B N N"], patch_mask: Bool[Tensor, "B N"]
) -> Float[Tensor, "B"]:
    """Mean over valid rows of the first minus the second score; 0 where only one is valid."""
    if scores.shape[-1] == 1:
        return scores.new_zeros(scores.shape[0])
    eligible = torch.where(patch_mask[:, None, :], scores, -torch.inf)
    first, second = eligible.topk(2, dim=-1).values.unbind(dim=-1)
    counted = patch_mask & (patch_mask.sum(dim=-1, keepdim=True) > 1)
    gap = torch.where(counted, first, 0.0) - torch.where(counted, second, 0.0)
    return gap.sum(dim=-1) / counted.sum(dim=-1).clamp(min=1)
