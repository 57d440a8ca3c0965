"""LightVLA's token pruner; `pruner_spec.pruner` is its definition, with the paper's equations.

Selection is compiled apart from its checks: functions that a user calls raise on scores that are
not finite; the model's own path never waits for the device, and reports them instead.

Dimension letters: B batch, N patches, M patches after pruning, T task tokens, D width.
"""

import dataclasses
import math
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from pruner_jax import kernels, kernels_plain
from pruner_jax.layers import wide
from pruner_spec.pruner import RMS_EPSILON, NonFiniteScoresError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """Which patches are kept at inference.

    Attributes:
        kept: bool [B, N].
        counts: int [B, P, 2], of each of the P pools that a sample's patches were selected in: how
            many are kept, and how many scores of valid patches are not finite. Those were not
            counted as votes; where there are any, the selection means nothing.
    """

    kept: Bool[Array, "B N"]
    counts: Int[Array, "B P 2"]

    @classmethod
    def of(cls, kept: Bool[Array, "B N"], nonfinite: Int[Array, "B"]) -> "Selection":
        """A selection in one pool."""
        return cls(kept, jnp.stack([kept.sum(axis=-1), nonfinite], axis=-1)[:, None])

    @property
    def nonfinite(self) -> Int[Array, "B"]:
        """Scores of a sample that are not finite."""
        return self.counts[:, :, 1].sum(axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrunedPatches:
    """Patches after pruning, in training (M = N) or packed at inference (M the capacity).

    Attributes:
        tokens: [B, M, D].
        index: int [B, M], where each stood among the N; it keeps that patch's position.
        valid: bool [B, M]; the others are padding.
    """

    tokens: Float[Array, "B M D"]
    index: Int[Array, "B M"]
    valid: Bool[Array, "B M"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrunedSequence:
    """LightVLA's `[cls, patches, task]` sequence after pruning, with M patches left.

    Attributes:
        tokens: [B, 1 + M + T, D].
        position_ids: int [B, 1 + M + T]; what is kept keeps its position.
        attention_mask: bool [B, 1 + M + T], False for padding.
    """

    tokens: Float[Array, "B S D"]
    position_ids: Int[Array, "B S"]
    attention_mask: Bool[Array, "B S"]


def all_valid(x: Float[Array, "B N _"]) -> Bool[Array, "B N"]:
    """A mask of x [B, N, ...] in which everything is valid."""
    return jnp.ones(x.shape[:2], dtype=bool)


def rms_normalize(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """x over its root mean square, in `wide` precision; no learned scale."""
    x = x.astype(wide(x.dtype))
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + RMS_EPSILON)


def task_queries(
    patches: Float[Array, "B N D"],
    task: Float[Array, "B T D"],
    task_mask: Bool[Array, "B T"],
) -> Float[Array, "B N D"]:
    """q = softmax(p·tᵀ/√D)·t over the valid task tokens; 0 where a sample has none."""
    return _queries(rms_normalize(patches), rms_normalize(task), task_mask)


def importance_score(
    patches: Float[Array, "B N D"],
    task: Float[Array, "B T D"],
    task_mask: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B N N"]:
    """score = rms(q)·pᵀ/√D in `wide` precision; row i holds what patch i thinks of every patch.

    A sample without a valid task token scores √D for every patch with itself, and 0 elsewhere.
    """
    task_mask = all_valid(task) if task_mask is None else task_mask
    width, count = patches.shape[-1], patches.shape[1]
    p = rms_normalize(patches)
    queries = rms_normalize(_queries(p, rms_normalize(task), task_mask))
    scores = _product("bnd,bmd->bnm", queries, p) / math.sqrt(width)
    each_its_own = jnp.eye(count, dtype=scores.dtype) * math.sqrt(width)
    return jnp.where(task_mask.any(axis=-1)[:, None, None], scores, each_its_own)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ballot:
    """How the patches voted, as in `pruner_spec.pruner.Ballot`, without their choices."""

    votes: Int[Array, "B N"]
    best: Float[Array, "B N"]


def vote(scores: Float[Array, "B N N"], patch_mask: Bool[Array, "B N"]) -> Ballot:
    """Every valid patch votes for the valid patch it scores highest; what is not finite does not.

    A row without a finite score casts no vote.
    """
    counted = patch_mask[:, :, None] & patch_mask[:, None, :] & jnp.isfinite(scores)
    eligible = jnp.where(counted, scores, -jnp.inf)
    choice = eligible.argmax(axis=-1)
    ballots = jax.nn.one_hot(choice, scores.shape[-1], dtype=jnp.int32)
    votes = (ballots * counted.any(axis=-1)[:, :, None]).sum(axis=1)
    return Ballot(votes=jnp.where(patch_mask, votes, -1), best=eligible.max(axis=1))


def select_hard(
    scores: Float[Array, "B N N"],
    patch_mask: Bool[Array, "B N"] | None = None,
    keep_tokens: int | Int[Array, "B"] | None = None,
    min_keep: int = 1,
) -> Bool[Array, "B N"]:
    """Which patches are kept at inference.

    Args:
        scores: from `importance_score`.
        patch_mask: valid patches; None for all.
        keep_tokens: how many to keep; None for the union of votes, at least `min_keep`.
        min_keep: what a smaller union is filled up to.

    Raises:
        NonFiniteScoresError: a score of a valid patch for a valid patch is not finite. Not when
            compiled, where such scores cast no vote.
    """
    selection = _select(scores, patch_mask, keep_tokens, min_keep)
    _check_finite(selection.nonfinite, scores)
    return selection.kept


def select_straight_through(
    scores: Float[Array, "B N N"],
    patch_mask: Bool[Array, "B N"] | None = None,
    noise: Float[Array, "B N N"] | None = None,
) -> Float[Array, "B N N"]:
    """One-hot rows at the patches voted for, exactly, with the softmax's gradient.

    Args:
        scores: from `importance_score`.
        patch_mask: valid patches; None for all. Rows of the others are 0.
        noise: added to the scores: uniform in [0, 1) times the noise scale.

    Raises:
        NonFiniteScoresError: as `select_hard`; compiled, the weights are NaN instead.
    """
    patch_mask = all_valid(scores) if patch_mask is None else patch_mask
    _check_finite(_count_nonfinite(scores, patch_mask), scores)
    return _straight_through(scores, patch_mask, noise)


def pack(patches: Float[Array, "B N D"], selection: Selection, capacity: int) -> PrunedPatches:
    """The kept patches in their order, then padding, at a static length.

    Patches of a sample whose scores were not finite become NaN, as its actions would without
    pruning: a broken input must not turn into confident actions.

    Args:
        patches: what was selected from.
        selection: at most `capacity` kept a sample.
        capacity: M, at most N.
    """
    place = jnp.arange(patches.shape[1])
    order = selection.kept.cumsum(axis=-1)  # of those that are kept, from 1
    most = order[:, -1:]
    slot = jnp.where(selection.kept, order - 1, most + place - order)
    index = jnp.put_along_axis(jnp.zeros_like(slot), slot, place[None], axis=-1, inplace=False)
    index = index[:, :capacity]
    tokens = jnp.take_along_axis(patches, index[:, :, None], axis=1)
    broken = (selection.nonfinite > 0)[:, None, None]
    return PrunedPatches(
        tokens=jnp.where(broken, jnp.nan, tokens),
        index=index,
        valid=place[:capacity] < most,
    )


@dataclasses.dataclass(frozen=True)
class ImageTokenPruner:
    """The pruner on image patches and language tokens that come apart.

    Attributes:
        keep_tokens: how many patches to keep; None for the union of votes.
        min_keep: what a smaller union is filled up to.
    """

    keep_tokens: int | None = None
    min_keep: int = 1

    def __call__(
        self,
        patches: Float[Array, "B N D"],
        task: Float[Array, "B T D"],
        task_mask: Bool[Array, "B T"] | None = None,
        patch_mask: Bool[Array, "B N"] | None = None,
        noise: Float[Array, "B N N"] | None = None,
        train: bool = False,
        capacity: int | None = None,
    ) -> PrunedPatches:
        """Softly selected patches in training, hard and packed ones otherwise.

        Args:
            patches: image tokens.
            task: language tokens.
            task_mask: valid language tokens; None for all.
            patch_mask: valid patches; None for all.
            noise: in training, added to the scores.
            train: soft selection, with gradients to the scores.
            capacity: M, patches after pruning at inference. None: `keep_tokens`, or else N.
        """
        if train:
            return self.relax(patches, task, task_mask, patch_mask, noise)
        if capacity is None:
            capacity = patches.shape[1] if self.keep_tokens is None else self.keep_tokens
        return pack(patches, self.select(patches, task, task_mask, patch_mask), capacity)

    def select(
        self,
        patches: Float[Array, "B N D"],
        task: Float[Array, "B T D"],
        task_mask: Bool[Array, "B T"] | None = None,
        patch_mask: Bool[Array, "B N"] | None = None,
        budget: Int[Array, "B"] | None = None,
        operations: ModuleType = kernels_plain,
    ) -> Selection:
        """The hard selection; `budget` a sample takes the place of `keep_tokens`."""
        keep_tokens = self.keep_tokens if budget is None else budget
        if operations is kernels and kernels.available(patches):
            from pruner_jax import kernels_pruner  # here, since it imports Triton

            task_mask = all_valid(task) if task_mask is None else task_mask
            patch_mask = all_valid(patches) if patch_mask is None else patch_mask
            if 0 < task.shape[1] <= kernels_pruner.MAX_TASK:
                scores = kernels_pruner.importance_score(patches, task, task_mask)
                found = kernels_pruner.elect(scores, patch_mask, keep_tokens, self.min_keep)
                return Selection(*found)
        scores = importance_score(patches, task, task_mask)
        return _select(scores, patch_mask, keep_tokens, self.min_keep)

    def relax(
        self,
        patches: Float[Array, "B N D"],
        task: Float[Array, "B T D"],
        task_mask: Bool[Array, "B T"] | None = None,
        patch_mask: Bool[Array, "B N"] | None = None,
        noise: Float[Array, "B N N"] | None = None,
    ) -> PrunedPatches:
        """The straight-through selection: row i is the patch that patch i votes for."""
        patch_mask = all_valid(patches) if patch_mask is None else patch_mask
        scores = importance_score(patches, task, task_mask)
        weights = _straight_through(scores, patch_mask, noise)
        # In `wide` precision, so that the scores' gradient is not rounded to bfloat16.
        tokens = _product("bnm,bmd->bnd", weights, patches.astype(weights.dtype))
        return PrunedPatches(
            tokens=tokens.astype(patches.dtype), index=weights.argmax(axis=-1), valid=patch_mask
        )


@dataclasses.dataclass(frozen=True)
class TokenPruner:
    """LightVLA's own module, on one sequence `[cls, patches, task]`, at any batch size.

    Attributes:
        num_patches: N.
        keep_tokens: how many patches to keep; None for the union of votes.
        min_keep: what a smaller union is filled up to.
    """

    num_patches: int
    keep_tokens: int | None = None
    min_keep: int = 1

    def __call__(
        self,
        tokens: Float[Array, "B 1+N+T D"],
        position_ids: Int[Array, "B 1+N+T"] | None = None,
        attention_mask: Bool[Array, "B 1+N+T"] | None = None,
        noise: Float[Array, "B N N"] | None = None,
        train: bool = False,
        capacity: int | None = None,
    ) -> PrunedSequence:
        """The sequence with its patches pruned.

        Args:
            tokens: one class token, the patches, the task's tokens.
            position_ids: None for 0, 1, 2 ...
            attention_mask: valid tokens; None for all.
            noise: in training, added to the scores.
            train: soft selection; the length stays.
            capacity: M, patches after pruning at inference. None: what the fullest sample keeps,
                which asks the device, or N when compiled.
        """
        batch, length = tokens.shape[:2]
        if position_ids is None:
            position_ids = jnp.broadcast_to(jnp.arange(length), (batch, length))
        attention_mask = (
            all_valid(tokens) if attention_mask is None else attention_mask.astype(bool)
        )
        ends = [1, 1 + self.num_patches]
        cls, patches, task = jnp.split(tokens, ends, axis=1)
        cls_position, patch_position, task_position = jnp.split(position_ids, ends, axis=1)
        cls_mask, patch_mask, task_mask = jnp.split(attention_mask, ends, axis=1)
        image_pruner = ImageTokenPruner(self.keep_tokens, self.min_keep)
        if train:
            pruned = image_pruner.relax(patches, task, task_mask, patch_mask, noise)
        else:
            selection = image_pruner.select(patches, task, task_mask, patch_mask)
            if capacity is None:
                capacity = most_kept(selection, patches.shape[1])
            pruned = pack(patches, selection, capacity)
        position = jnp.take_along_axis(patch_position, pruned.index, axis=1)
        return PrunedSequence(
            tokens=jnp.concatenate([cls, pruned.tokens, task], axis=1),
            position_ids=jnp.concatenate([cls_position, position, task_position], axis=1),
            attention_mask=jnp.concatenate([cls_mask, pruned.valid, task_mask], axis=1),
        )


def most_kept(selection: Selection, limit: int) -> int:
    """Patches kept in the fullest sample: the one read from the device; traced, `limit`.

    Raises:
        NonFiniteScoresError: the scores were not finite.
    """
    if isinstance(selection.kept, Tracer):
        return limit
    counts = np.asarray(selection.counts)
    if nonfinite := int(counts[:, :, 1].sum()):
        raise NonFiniteScoresError(nonfinite, tuple(selection.kept.shape))
    return int(counts[:, :, 0].sum(axis=1).max())


def _select(
    scores: Float[Array, "B N N"],
    patch_mask: Bool[Array, "B N"] | None,
    keep_tokens: int | Int[Array, "B"] | None,
    min_keep: int,
) -> Selection:
    patch_mask = all_valid(scores) if patch_mask is None else patch_mask
    ballot = vote(scores, patch_mask)
    elected = (ballot.votes > 0).sum(axis=-1, keepdims=True)
    seats = elected.clip(min=min_keep) if keep_tokens is None else keep_tokens
    if not isinstance(keep_tokens, int | None):
        seats = keep_tokens[:, None]
    kept = (_rank(ballot) < seats) & patch_mask
    return Selection.of(kept, _count_nonfinite(scores, patch_mask))


def _rank(ballot: Ballot) -> Int[Array, "B N"]:
    """How many patches come before each: by votes, then by best score, then by place.

    Counted pair by pair, which is one pass on a GPU; sorting would be many.
    """
    votes, best = ballot.votes, ballot.best
    place = jnp.arange(votes.shape[-1])
    before = place < place[:, None]  # [N, N]: the column's patch is before the row's
    before = (best[:, None, :] == best[:, :, None]) & before | (best[:, None, :] > best[:, :, None])
    before = (votes[:, None, :] == votes[:, :, None]) & before
    return (before | (votes[:, None, :] > votes[:, :, None])).sum(axis=-1)


def _straight_through(
    scores: Float[Array, "B N N"],
    patch_mask: Bool[Array, "B N"],
    noise: Float[Array, "B N N"] | None,
) -> Float[Array, "B N N"]:
    scores = scores if noise is None else scores + noise.astype(scores.dtype)
    eligible = jnp.where(patch_mask[:, None, :], scores, jnp.finfo(scores.dtype).min)
    soft = jax.nn.softmax(eligible, axis=-1)
    hard = jax.nn.one_hot(eligible.argmax(axis=-1), scores.shape[-1], dtype=scores.dtype)
    return (hard + (soft - jax.lax.stop_gradient(soft))) * patch_mask[:, :, None]


def _count_nonfinite(
    scores: Float[Array, "B N N"], patch_mask: Bool[Array, "B N"]
) -> Int[Array, "B"]:
    counted = patch_mask[:, :, None] & patch_mask[:, None, :]
    return (counted & ~jnp.isfinite(scores)).sum(axis=(1, 2))


def _check_finite(nonfinite: Int[Array, "B"], scores: Float[Array, "B N N"]) -> None:
    if isinstance(nonfinite, Tracer):
        return
    if count := int(nonfinite.sum()):
        raise NonFiniteScoresError(count, tuple(scores.shape))


def _queries(
    p: Float[Array, "B N D"], t: Float[Array, "B T D"], task_mask: Bool[Array, "B T"]
) -> Float[Array, "B N D"]:
    """`task_queries` of what is normalised already."""
    logits = _product("bnd,btd->bnt", p, t) / math.sqrt(p.shape[-1])
    return _product("bnt,btd->bnd", _masked_softmax(logits, task_mask[:, None, :]), t)


def _masked_softmax(
    logits: Float[Array, "B N T"], mask: Bool[Array, "B 1 T"]
) -> Float[Array, "B N T"]:
    """Softmax over the last axis within the mask; 0 outside it, and where nothing is within."""
    within = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    return jnp.where(mask, jax.nn.softmax(within, axis=-1), 0.0)


def _product(subscripts: str, a: Array, b: Array) -> Array:
    """An einsum at full precision, whatever the device's default is for float32."""
    return jnp.einsum(subscripts, a, b, precision=jax.lax.Precision.HIGHEST)
