"""What a policy's pruner looked at in the frames of an episode.

The ballots are the spec's, in float64, of the tokens that the model's pruner read; which patches
are kept is the model's own choice. The two differ only where a decision is closer than the model's
precision.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from pruner_run.backend import Pruned
from pruner_run.data.samples import RobotSamples
from pruner_run.policy import Policy
from pruner_spec import pruner
from pruner_spec.config import Pi0Config


@dataclasses.dataclass(frozen=True)
class Attention:
    """T frames of an episode, as C cameras saw them and the pruner voted on their N patches.

    Attributes:
        model: that looked.
        instruction: what the robot was told.
        frames: their numbers in the episode.
        seconds: when they were.
        images: by camera, as the model saw them.
        votes: how many patches vote for a patch, of its camera or, in the joint scope, of all.
        best: the highest score that any of them gives to it.
        kept: the model's own selection.
        diagnostics: by name, a number a pool of T: a camera, or in the joint scope the frame.
    """

    model: Pi0Config
    instruction: str
    frames: list[int]
    seconds: Float[np.ndarray, "T"]
    images: Mapping[str, UInt8[np.ndarray, "T 224 224 3"]]
    votes: Int[np.ndarray, "T C N"]
    best: Float[np.ndarray, "T C N"]
    kept: Bool[np.ndarray, "T C N"]
    diagnostics: Mapping[str, list[list[float]]]

    @property
    def is_joint(self) -> bool:
        """Whether the cameras of a frame are one pool."""
        return self.model.token_prune_scope == "joint"

    def at(self, places: list[int]) -> "Attention":
        """Some of the frames."""
        return dataclasses.replace(
            self,
            frames=[self.frames[place] for place in places],
            seconds=self.seconds[places],
            images={camera: images[places] for camera, images in self.images.items()},
            votes=self.votes[places],
            best=self.best[places],
            kept=self.kept[places],
            diagnostics={
                name: [rows[place] for place in places] for name, rows in self.diagnostics.items()
            },
        )

    def elect(self, keep_tokens: int | None) -> Bool[np.ndarray, "T C N"]:
        """The spec's selection by these ballots.

        Args:
            keep_tokens: patches a camera; None for the union of votes.
        """
        frames, cameras, patches = self.votes.shape
        pools = (frames, -1) if self.is_joint else (frames * cameras, -1)
        votes, best = self.votes.reshape(pools), self.best.reshape(pools)
        if keep_tokens is not None and self.is_joint:
            keep_tokens *= cameras
        kept = pruner.elect(votes, best, keep_tokens, self.model.token_prune_min_keep)
        return kept.reshape(frames, cameras, patches)


def look(policy: Policy, samples: RobotSamples, indices: Iterable[int]) -> Attention:
    """Lets a policy look at frames of one episode, one by one as on a robot.

    Args:
        policy: one that prunes.
        samples: of the policy's robot.
        indices: of the frames, in the dataset.

    Raises:
        ValueError: a frame is not what the policy expects.
    """
    model = policy.config.model
    instruction, places, images, choices, ballots = "", [], [], [], []
    for index in indices:
        sample = samples[index]
        prepared = policy.prepare(sample)
        choice = policy.choose(prepared)
        instruction = instruction or sample.get("prompt", policy.config.data.default_prompt)
        places.append(index)
        images.append([prepared.inputs[f"image/{camera}"] for camera in choice.cameras])
        choices.append(choice)
        ballots.append(_ballot(choice.pruned, is_joint=model.token_prune_scope == "joint"))
    columns, stacked = samples.dataset.columns, np.stack(images)
    kept = np.concatenate([choice.pruned.kept for choice in choices])
    return Attention(
        model=model,
        instruction=str(np.asarray(instruction).item()),
        frames=columns["frame_index"][places].tolist(),
        seconds=columns["timestamp"][places].astype(np.float64),
        images={camera: stacked[:, place] for place, camera in enumerate(choices[0].cameras)},
        votes=np.stack([ballot.votes for ballot in ballots]).reshape(kept.shape),
        best=np.stack([ballot.best for ballot in ballots]).reshape(kept.shape),
        kept=kept,
        diagnostics={
            name: [list(choice.diagnostics[name]) for choice in choices]
            for name in choices[0].diagnostics
        },
    )


def _ballot(pruned: Pruned, *, is_joint: bool) -> pruner.Ballot:
    """Of one observation, a pool a row."""
    _, cameras, _, width = pruned.patches.shape
    pools = 1 if is_joint else cameras
    patches = pruned.patches.reshape(pools, -1, width)
    task = np.repeat(pruned.prompt, pools, axis=0)
    task_mask = np.repeat(pruned.prompt_mask, pools, axis=0)
    scores = pruner.importance_score(patches, task, task_mask)
    return pruner.vote(scores, np.ones(scores.shape[:2], dtype=bool))
