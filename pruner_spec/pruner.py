"""LightVLA's token pruner (arXiv 2509.12594), defined in float64.

This is the reference both backends are held to, written to be read beside the paper. Every patch
asks which patch matters most for the task: it attends to the task's tokens, and the answer, its
query, is compared with all patches. What is voted for by any patch is kept. There are no
parameters.

What the paper leaves open is settled here:

- Padding among the task's tokens takes no part in the attention. A sample without any task token
  has nothing to prune by: every patch votes for itself, and all are kept.
- Invalid patches, those of a masked camera, neither vote nor can be voted for; none is kept.
- Ties go to the lowest index.
- A budget keeps the patches with most votes, then with the highest best score. `min_keep` fills
  a smaller union up in the same order. There are never more kept than are valid.
- In training row i of the output is the patch that patch i voted for, valid where patch i is. The
  forward pass is exactly one-hot: `hard + (soft - stop_gradient(soft))`.
- A score that is not finite is an error, never a vote.

Dimension letters: B batch, N patches (of a camera, or of all), T task tokens, D width.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

RMS_EPSILON = 1e-6


class NonFiniteScoresError(ValueError):
    """Scores of valid patches are not finite: there is no selection to be made from them."""

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        super().__init__(
            f"scores: expected finite scores of shape {list(shape)}, got {count} that are not "
            "finite; the patches or the task tokens hold NaN or infinity"
        )


def rms_normalize(x: Float[np.ndarray, "*batch D"]) -> Float[np.ndarray, "*batch D"]:
    """x over its root mean square; no learned scale."""
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + RMS_EPSILON)


def task_queries(
    patches: Float[np.ndarray, "B N D"],
    task: Float[np.ndarray, "B T D"],
    task_mask: Bool[np.ndarray, "B T"],
) -> Float[np.ndarray, "B N D"]:
    """q = softmax(p·tᵀ/√D)·t over the valid task tokens; 0 where a sample has none."""
    p, t = rms_normalize(patches), rms_normalize(task)
    logits = np.einsum("bnd,btd->bnt", p, t) / math.sqrt(p.shape[-1])
    return np.einsum("bnt,btd->bnd", _masked_softmax(logits, task_mask[:, None, :]), t)


def importance_score(
    patches: Float[np.ndarray, "B N D"],
    task: Float[np.ndarray, "B T D"],
    task_mask: Bool[np.ndarray, "B T"] | None = None,
) -> Float64[np.ndarray, "B N N"]:
    """score = rms(q)·pᵀ/√D; row i holds what patch i thinks of every patch.

    A sample without a valid task token scores √D, the highest there can be, for every patch with
    itself, and 0 elsewhere.
    """
    patches, task = patches.astype(np.float64), task.astype(np.float64)
    task_mask = np.ones(task.shape[:2], dtype=bool) if task_mask is None else task_mask
    width = patches.shape[-1]
    queries = rms_normalize(task_queries(patches, task, task_mask))
    scores = np.einsum("bnd,bmd->bnm", queries, rms_normalize(patches)) / math.sqrt(width)
    each_its_own = math.sqrt(width) * np.eye(patches.shape[1])
    return np.where(_has_any(task_mask), scores, each_its_own)


@dataclasses.dataclass(frozen=True)
class Ballot:
    """How the patches voted.

    Attributes:
        choice: int [B, N], the patch that patch i votes for; 0 where i is not valid.
        votes: int [B, N], how many valid patches vote for patch j; -1 where j is not valid.
        best: [B, N], the highest score any valid patch gives to patch j; -inf where j is not valid.
    """

    choice: Int[np.ndarray, "B N"]
    votes: Int[np.ndarray, "B N"]
    best: Float[np.ndarray, "B N"]


def vote(scores: Float[np.ndarray, "B N N"], patch_mask: Bool[np.ndarray, "B N"]) -> Ballot:
    """Every valid patch votes for the valid patch it scores highest, the first of equals.

    Raises:
        NonFiniteScoresError: a score of a valid patch for a valid patch is not finite.
    """
    counted = patch_mask[:, :, None] & patch_mask[:, None, :]
    if bad := int(np.sum(counted & ~np.isfinite(scores))):
        raise NonFiniteScoresError(bad, scores.shape)
    eligible = np.where(counted, scores, -np.inf)
    choice = eligible.argmax(axis=-1)
    ballots = (choice[:, :, None] == np.arange(scores.shape[-1])) & patch_mask[:, :, None]
    votes = np.where(patch_mask, ballots.sum(axis=1), -1)
    return Ballot(choice=choice, votes=votes, best=eligible.max(axis=1))


def select_hard(
    scores: Float[np.ndarray, "B N N"],
    patch_mask: Bool[np.ndarray, "B N"] | None = None,
    keep_tokens: int | None = None,
    min_keep: int = 1,
) -> Bool[np.ndarray, "B N"]:
    """Which patches are kept at inference.

    Args:
        scores: from `importance_score`.
        patch_mask: valid patches; None for all.
        keep_tokens: how many to keep; None for the union of votes, at least `min_keep`.
    """
    patch_mask = np.ones(scores.shape[:2], dtype=bool) if patch_mask is None else patch_mask
    ballot = vote(scores, patch_mask)
    return elect(ballot.votes, ballot.best, keep_tokens, min_keep)


def elect(
    votes: Int[np.ndarray, "B N"],
    best: Float[np.ndarray, "B N"],
    keep_tokens: int | None = None,
    min_keep: int = 1,
) -> Bool[np.ndarray, "B N"]:
    """Which patches are kept, once the votes are counted; arguments as of `Ballot`."""
    elected = np.sum(votes > 0, axis=-1)
    seats = np.maximum(elected, min_keep) if keep_tokens is None else keep_tokens
    # lexsort is stable and its last key is the first to count.
    rank = np.argsort(np.lexsort((-best, -votes), axis=-1), axis=-1)
    return (rank < np.broadcast_to(seats, rank.shape[:1])[:, None]) & (votes >= 0)


def select_straight_through(
    scores: Float[np.ndarray, "B N N"],
    patch_mask: Bool[np.ndarray, "B N"] | None = None,
    noise: Float[np.ndarray, "B N N"] | None = None,
) -> Float[np.ndarray, "B N N"]:
    """Row i is one-hot at the patch that patch i votes for under the noise; 0 if i is not valid.

    Args:
        noise: added to the scores: uniform in [0, 1) times the noise scale.
    """
    patch_mask = np.ones(scores.shape[:2], dtype=bool) if patch_mask is None else patch_mask
    choice = vote(scores if noise is None else scores + noise, patch_mask).choice
    one_hot = (choice[:, :, None] == np.arange(scores.shape[-1])).astype(scores.dtype)
    return one_hot * patch_mask[:, :, None]


@dataclasses.dataclass(frozen=True)
class TrainingSelection:
    """What training sees of the pruner: the selected patches and the gradients of their sum.

    Attributes:
        output: [B, N, D], row i is the patch that patch i voted for.
        grad_patches: gradient of sum(output * cotangent) with respect to the patches.
        grad_task: the same with respect to the task tokens.
    """

    output: Float64[np.ndarray, "B N D"]
    grad_patches: Float64[np.ndarray, "B N D"]
    grad_task: Float64[np.ndarray, "B T D"]


def prune_for_training(
    patches: Float[np.ndarray, "B N D"],
    task: Float[np.ndarray, "B T D"],
    cotangent: Float[np.ndarray, "B N D"],
    task_mask: Bool[np.ndarray, "B T"] | None = None,
    patch_mask: Bool[np.ndarray, "B N"] | None = None,
    noise: Float[np.ndarray, "B N N"] | None = None,
) -> TrainingSelection:
    """The straight-through selection, with its gradients derived by hand.

    The hard weights pass the cotangent on to the patches they picked; the score gets the gradient
    that the softmax would have had in the hard weights' place.
    """
    patches, task, cotangent = (x.astype(np.float64) for x in (patches, task, cotangent))
    task_mask = np.ones(task.shape[:2], dtype=bool) if task_mask is None else task_mask
    patch_mask = np.ones(patches.shape[:2], dtype=bool) if patch_mask is None else patch_mask
    scores = importance_score(patches, task, task_mask)
    noisy = scores if noise is None else scores + noise.astype(np.float64)
    weights = select_straight_through(noisy, patch_mask)

    counted = patch_mask[:, :, None] & patch_mask[:, None, :]
    soft = _masked_softmax(noisy, counted)
    grad_weights = np.einsum("bnd,bmd->bnm", cotangent, patches)
    grad_scores = _softmax_vjp(soft, grad_weights)
    grad_scores *= _has_any(task_mask)
    through_patches, grad_task = _score_vjp(patches, task, task_mask, grad_scores)
    return TrainingSelection(
        output=np.einsum("bnm,bmd->bnd", weights, patches),
        grad_patches=np.einsum("bnm,bnd->bmd", weights, cotangent) + through_patches,
        grad_task=grad_task,
    )


@dataclasses.dataclass(frozen=True)
class Diagnostics:
    """What shows that a selection has collapsed, a number a sample each.

    When the queries of different patches become almost equal, all vote alike and the union shrinks
    to two or three patches of hundreds.

    Attributes:
        top_votes: votes of the most voted patch.
        top_votes_share: the same over all votes; 1 when every patch votes for one.
        score_gap: mean over patches of their first minus their second highest score.
        patches_spread, task_spread, queries_spread: root mean square distance from the mean token
            over the root mean square norm; 0 when all tokens are equal, 1 when they cancel.
        patches_normalized_spread, task_normalized_spread, queries_normalized_spread: the same after
            normalisation.
    """

    top_votes: Int[np.ndarray, "B"]
    top_votes_share: Float[np.ndarray, "B"]
    score_gap: Float[np.ndarray, "B"]
    patches_spread: Float[np.ndarray, "B"]
    patches_normalized_spread: Float[np.ndarray, "B"]
    task_spread: Float[np.ndarray, "B"]
    task_normalized_spread: Float[np.ndarray, "B"]
    queries_spread: Float[np.ndarray, "B"]
    queries_normalized_spread: Float[np.ndarray, "B"]


def diagnose(
    patches: Float[np.ndarray, "B N D"],
    task: Float[np.ndarray, "B T D"],
    task_mask: Bool[np.ndarray, "B T"] | None = None,
    patch_mask: Bool[np.ndarray, "B N"] | None = None,
) -> Diagnostics:
    """The diagnostics of a selection by these patches and this task."""
    patches, task = patches.astype(np.float64), task.astype(np.float64)
    task_mask = np.ones(task.shape[:2], dtype=bool) if task_mask is None else task_mask
    patch_mask = np.ones(patches.shape[:2], dtype=bool) if patch_mask is None else patch_mask
    scores = importance_score(patches, task, task_mask)
    ballot = vote(scores, patch_mask)
    queries = task_queries(patches, task, task_mask)
    top_votes = ballot.votes.max(axis=-1).clip(0)
    return Diagnostics(
        top_votes=top_votes,
        top_votes_share=top_votes / patch_mask.sum(axis=-1).clip(1),
        score_gap=_mean_gap(scores, patch_mask),
        patches_spread=spread(patches, patch_mask),
        patches_normalized_spread=spread(rms_normalize(patches), patch_mask),
        task_spread=spread(task, task_mask),
        task_normalized_spread=spread(rms_normalize(task), task_mask),
        queries_spread=spread(queries, patch_mask),
        queries_normalized_spread=spread(rms_normalize(queries), patch_mask),
    )


def spread(
    tokens: Float[np.ndarray, "B N D"], mask: Bool[np.ndarray, "B N"]
) -> Float[np.ndarray, "B"]:
    """Root mean square distance of the valid tokens from their mean, over their rms norm."""
    weight = mask[:, :, None]
    count = mask.sum(axis=-1).clip(1)
    mean = (tokens * weight).sum(axis=1, keepdims=True) / count[:, None, None]
    distance = (np.square(tokens - mean) * weight).sum(axis=(1, 2))
    norm = (np.square(tokens) * weight).sum(axis=(1, 2))
    return np.sqrt(distance / np.where(norm > 0, norm, 1.0))


def _mean_gap(
    scores: Float[np.ndarray, "B N N"], patch_mask: Bool[np.ndarray, "B N"]
) -> Float[np.ndarray, "B"]:
    """Mean over valid rows of the first minus the second score; 0 where only one is valid."""
    if scores.shape[-1] == 1:
        return np.zeros(len(scores))
    eligible = np.where(patch_mask[:, None, :], scores, -np.inf)
    second, first = np.moveaxis(np.sort(eligible, axis=-1)[..., -2:], -1, 0)
    counted = patch_mask & (patch_mask.sum(axis=-1, keepdims=True) > 1)
    gap = np.where(counted, first, 0.0) - np.where(counted, second, 0.0)
    return gap.sum(axis=-1) / counted.sum(axis=-1).clip(1)


def _has_any(task_mask: Bool[np.ndarray, "B T"]) -> Bool[np.ndarray, "B 1 1"]:
    return np.asarray(task_mask.any(axis=-1))[:, None, None]


def _masked_softmax(logits: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Softmax over the last axis within the mask; 0 outside it, and where nothing is within."""
    logits = np.where(mask, logits, -np.inf)
    top = logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total > 0, total, 1.0)


def _softmax_vjp(soft: np.ndarray, grad: np.ndarray) -> np.ndarray:
    return soft * (grad - np.sum(soft * grad, axis=-1, keepdims=True))


def _rms_vjp(x: np.ndarray, grad: np.ndarray) -> np.ndarray:
    inverse = 1 / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + RMS_EPSILON)
    return inverse * grad - x * inverse**3 * np.mean(x * grad, axis=-1, keepdims=True)


def _score_vjp(
    patches: np.ndarray, task: np.ndarray, task_mask: np.ndarray, grad_scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of `importance_score` with respect to patches and task."""
    root = math.sqrt(patches.shape[-1])
    p, t = rms_normalize(patches), rms_normalize(task)
    logits = np.einsum("bnd,btd->bnt", p, t) / root
    attention = _masked_softmax(logits, task_mask[:, None, :])
    queries = np.einsum("bnt,btd->bnd", attention, t)

    grad_q = _rms_vjp(queries, np.einsum("bnm,bmd->bnd", grad_scores, p) / root)
    grad_p = np.einsum("bnm,bnd->bmd", grad_scores, rms_normalize(queries)) / root
    grad_t = np.einsum("bnt,bnd->btd", attention, grad_q)
    grad_logits = _softmax_vjp(attention, np.einsum("bnd,btd->bnt", grad_q, t)) / root
    grad_p += np.einsum("bnt,btd->bnd", grad_logits, t)
    grad_t += np.einsum("bnt,bnd->btd", grad_logits, p)
    return _rms_vjp(patches, grad_p), _rms_vjp(task, grad_t)
