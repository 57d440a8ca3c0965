"""What a training step reports: measured a sample each, summed up over the whole batch.

The two are apart, since a batch may be computed in parts and by several devices.

Dimension letters: B batch, P pools (see `Pi0.pools`), C cameras, N patches.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pruner_jax.diagnostics import diagnose
from pruner_jax.pruner import PrunedPatches

if TYPE_CHECKING:
    from pruner_jax.pi0 import Encoded, LossTerms, Pi0


@jax.tree_util.register_dataclass
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

    patches: Int[Array, "B"]
    kept: Int[Array, "B"]
    noisy_kept: Int[Array, "B"]
    task_length: Int[Array, "B"]
    pools: Bool[Array, "B P"]
    top_votes_share: Float[Array, "B P"]
    score_gap: Float[Array, "B P"]
    queries_spread: Float[Array, "B P"]
    patches_spread: Float[Array, "B P"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Measures:
    """What is measured of a batch.

    Attributes:
        loss: of each sample.
        pruning: None in a model that does not prune.
    """

    loss: Float[Array, "B"]
    pruning: Pruning | None


def measure(model: "Pi0", terms: "LossTerms") -> Measures:
    """Of a batch whose loss was computed; nothing here has a gradient but the loss."""
    loss = terms.loss.mean(axis=-1)
    if terms.pruned is None:
        return Measures(loss=loss, pruning=None)
    pruning = _pruning(model, *jax.lax.stop_gradient((terms.encoded, terms.pruned)))
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
        patches=encoded.camera_mask.sum(axis=-1) * patches,
        kept=model.select(encoded).kept.sum(axis=-1),
        noisy_kept=_different(pruned),
        task_length=encoded.prompt_mask.sum(axis=-1),
        pools=pools[3].any(axis=-1).reshape(batch, -1),
        **by_pool,
    )


def summarize(measures: Measures) -> dict[str, Float[Array, ""]]:
    """The metrics of a batch, by name."""
    metrics = {"loss": measures.loss.mean()}
    if measures.pruning is None:
        return metrics
    pruning, dtype = measures.pruning, measures.loss.dtype
    for prefix, counts in (("", pruning.kept), ("noisy_", pruning.noisy_kept)):
        kept = counts.astype(dtype)
        metrics |= {
            f"prune/{prefix}kept_tokens_mean": kept.mean(),
            f"prune/{prefix}kept_tokens_min": kept.min(),
            f"prune/{prefix}kept_tokens_max": kept.max(),
            f"prune/{prefix}kept_ratio": kept.sum() / pruning.patches.sum().clip(min=1),
        }
    weight = pruning.pools.astype(dtype)
    weight = weight / weight.sum().clip(min=1)
    return metrics | {
        "prune/argmax_top1_share": (pruning.top_votes_share * weight).sum(),
        "prune/score_top1_gap": (pruning.score_gap * weight).sum(),
        "prune/queries_spread": (pruning.queries_spread * weight).sum(),
        "prune/patches_spread": (pruning.patches_spread * weight).sum(),
        "prune/task_valid_len": pruning.task_length.astype(dtype).mean(),
    }


def _different(pruned: PrunedPatches) -> Int[Array, "B"]:
    """How many different patches there are among the valid ones."""
    sample = jnp.arange(pruned.index.shape[0])[:, None]
    seen = jnp.zeros(pruned.index.shape, bool).at[sample, pruned.index].max(pruned.valid)
    return seen.sum(axis=-1)
