"""What shows that a selection has collapsed; computed only when asked for.

Dimension letters: B batch, N patches, T task tokens, D width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pruner_jax.layers import wide
from pruner_jax.pruner import all_valid, importance_score, rms_normalize, task_queries, vote


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Diagnostics:
    """What shows that a selection collapsed, as in `pruner_spec.pruner.Diagnostics`; [B] each."""

    top_votes: Int[Array, "B"]
    top_votes_share: Float[Array, "B"]
    score_gap: Float[Array, "B"]
    patches_spread: Float[Array, "B"]
    patches_normalized_spread: Float[Array, "B"]
    task_spread: Float[Array, "B"]
    task_normalized_spread: Float[Array, "B"]
    queries_spread: Float[Array, "B"]
    queries_normalized_spread: Float[Array, "B"]


def diagnose(
    patches: Float[Array, "B N D"],
    task: Float[Array, "B T D"],
    task_mask: Bool[Array, "B T"] | None = None,
    patch_mask: Bool[Array, "B N"] | None = None,
) -> Diagnostics:
    """The diagnostics of a selection by these patches and this task, in `wide` precision."""
    patches, task = (x.astype(wide(x.dtype)) for x in (patches, task))
    task_mask = all_valid(task) if task_mask is None else task_mask
    patch_mask = all_valid(patches) if patch_mask is None else patch_mask
    scores = importance_score(patches, task, task_mask)
    queries = task_queries(patches, task, task_mask)
    top_votes = vote(scores, patch_mask).votes.max(axis=-1).clip(min=0)
    return Diagnostics(
        top_votes=top_votes,
        top_votes_share=top_votes.astype(scores.dtype) / patch_mask.sum(axis=-1).clip(min=1),
        score_gap=_mean_gap(scores, patch_mask),
        patches_spread=spread(patches, patch_mask),
        patches_normalized_spread=spread(rms_normalize(patches), patch_mask),
        task_spread=spread(task, task_mask),
        task_normalized_spread=spread(rms_normalize(task), task_mask),
        queries_spread=spread(queries, patch_mask),
        queries_normalized_spread=spread(rms_normalize(queries), patch_mask),
    )


def spread(tokens: Float[Array, "B N D"], mask: Bool[Array, "B N"]) -> Float[Array, "B"]:
    """Root mean square distance of the valid tokens from their mean, over their rms norm."""
    weight = mask[:, :, None].astype(tokens.dtype)
    count = weight.sum(axis=1, keepdims=True).clip(min=1)
    mean = (tokens * weight).sum(axis=1, keepdims=True) / count
    distance = (jnp.square(tokens - mean) * weight).sum(axis=(1, 2))
    norm = (jnp.square(tokens) * weight).sum(axis=(1, 2))
    return jnp.sqrt(distance / jnp.where(norm > 0, norm, 1.0))


def _mean_gap(scores: Float[Array, "B N N"], patch_mask: Bool[Array, "B N"]) -> Float[Array, "B"]:
    """Mean over valid rows of the first minus the second score; 0 where only one is valid."""
    if scores.shape[-1] == 1:
        return jnp.zeros(scores.shape[0], scores.dtype)
    eligible = jnp.where(patch_mask[:, None, :], scores, -jnp.inf)
    first, second = jnp.moveaxis(jax.lax.top_k(eligible, 2)[0], -1, 0)
    counted = patch_mask & (patch_mask.sum(axis=-1, keepdims=True) > 1)
    gap = jnp.where(counted, first, 0.0) - jnp.where(counted, second, 0.0)
    return gap.sum(axis=-1) / counted.sum(axis=-1).clip(min=1)
