"""How far two backends agree, and how near the closest decision of the pruner was to a tie.

The pruner takes an argmax. Where its two best scores differ by less than float32 resolves, two
correct backends may keep different patches, and their actions then differ as well.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from pruner_run.backend import Pruned
from pruner_run.measurement import Measurement
from pruner_spec import pruner
from pruner_spec.config import Pi0Config


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Two backends on the same frames.

    Attributes:
        patches: how many patches were kept or not.
        differing_patches: how many of them one backend keeps and the other does not.
        differing_frames: in how many frames there is such a patch.
        closest_margin: score by which the closest decision was made; among the pools whose masks
            differ, where there are any.
        actions_difference: the largest between the pruned actions.
        unpruned_actions_difference: the largest between the unpruned actions.
        largest_action: what the differences are to be seen against.
    """

    patches: int
    differing_patches: int
    differing_frames: int
    closest_margin: float
    actions_difference: float
    unpruned_actions_difference: float
    largest_action: float


def compare(first: Measurement, second: Measurement, config: Pi0Config) -> Agreement:
    """The agreement of two backends; margins are the first's."""
    differs = first.selection.kept != second.selection.kept
    margins = decision_margins(first.selection, config)
    disputed = differs.reshape(len(margins), -1).any(axis=-1)
    return Agreement(
        patches=differs.size,
        differing_patches=int(differs.sum()),
        differing_frames=int(differs.any(axis=(1, 2)).sum()),
        closest_margin=float(margins[disputed if disputed.any() else ...].min()),
        actions_difference=_largest(first.pruned.actions - second.pruned.actions),
        unpruned_actions_difference=_largest(first.unpruned.actions - second.unpruned.actions),
        largest_action=_largest(first.unpruned.actions),
    )


def pruning_error(measurement: Measurement) -> float:
    """Norm of what pruning changes in the actions, over the norm of the unpruned actions."""
    unpruned = measurement.unpruned.actions
    change = measurement.pruned.actions - unpruned
    return float(np.linalg.norm(change) / np.linalg.norm(unpruned))


def decision_margins(selection: Pruned, config: Pi0Config) -> Float[np.ndarray, "pools"]:
    """By how much score the closest decision in each pool was made, in float64.

    A decision is a patch's vote, or, under a budget, who of two patches with equally many votes is
    the last to be kept. All cameras must be there. A pool is a camera of a frame, or, in the joint
    scope, a frame.
    """
    frames, cameras, _, width = selection.patches.shape
    pools = frames if config.token_prune_scope == "joint" else frames * cameras
    patches = selection.patches.reshape(pools, -1, width)
    task = np.repeat(selection.prompt, pools // frames, axis=0)
    task_mask = np.repeat(selection.prompt_mask, pools // frames, axis=0)
    scores = pruner.importance_score(patches, task, task_mask)
    second, first = np.moveaxis(np.partition(scores, -2, axis=-1)[..., -2:], -1, 0)
    margins = (first - second).min(axis=-1)
    if config.keep_budget is None or not config.prunes_at_inference:
        return margins
    seats = config.keep_budget * (frames * cameras // pools)
    return np.minimum(margins, _seat_margins(scores, seats))


def _seat_margins(scores: Float[np.ndarray, "pools N N"], seats: int) -> Float[np.ndarray, "pools"]:
    """Best score of the last patch kept minus that of the first left out; inf if votes decide."""
    ballot = pruner.vote(scores, np.ones(scores.shape[:2], dtype=bool))
    order = np.lexsort((-ballot.best, -ballot.votes), axis=-1)[:, seats - 1 : seats + 1]
    best = np.take_along_axis(ballot.best, order, axis=-1)
    votes = np.take_along_axis(ballot.votes, order, axis=-1)
    return np.where(votes[:, 0] == votes[:, 1], best[:, 0] - best[:, 1], np.inf)


def _largest(array: np.ndarray) -> float:
    return float(np.abs(array).max())
