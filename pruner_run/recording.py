"""Some frames of a recorded episode, as a robot would show them to the model."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from pruner_run.data.lerobot import LeRobotDataset
from pruner_run.data.normalization import FeatureStats
from pruner_run.tokenizer import PromptTokenizer
from pruner_spec.config import CAMERAS, Pi0Config
from pruner_spec.observation import Observation

_IMAGE, _STATE = "observation.images.{}", "observation.state"


@dataclasses.dataclass(frozen=True)
class Recording:
    """T frames of an episode.

    Attributes:
        instruction: what the robot was told.
        frames: their numbers in the episode.
        seconds: when they were.
        images: by camera.
        observation: the same as the model reads it, a batch of T.
    """

    instruction: str
    frames: list[int]
    seconds: Float[np.ndarray, "T"]
    images: Mapping[str, UInt8[np.ndarray, "T H W 3"]]
    observation: Observation


def read_recording(
    root: str | Path, tokenizer: PromptTokenizer, config: Pi0Config, *, count: int
) -> Recording:
    """Frames spread evenly over the first episode of a dataset, its first and last among them.

    Args:
        root: a LeRobot dataset with the cameras `CAMERAS`.
        tokenizer: of the instruction.
        config: the sizes of the model, and whether its prompt holds the state.
        count: T; for 1, the middle of the episode.

    Raises:
        FileNotFoundError: there is no dataset, or one of its files is missing.
        ValueError: the episode has no such number of frames, or the dataset does not fit.
    """
    dataset = LeRobotDataset(root)
    length = len(dataset.episodes[0])
    if not 1 <= count <= length:
        raise ValueError(f"frames: expected 1..{length}, got {count}")
    places = np.linspace(0, length - 1, count) if count > 1 else np.array([length // 2])
    frames = places.round().astype(int)
    episode = dataset.episode(0, cameras=[_IMAGE.format(camera) for camera in CAMERAS])
    images = {camera: episode[_IMAGE.format(camera)][frames] for camera in CAMERAS}
    instruction = episode["task"][0]
    stats = FeatureStats.read(root, _STATE)
    state = stats.normalize(episode[_STATE][frames], quantiles=True)
    prompts = [
        tokenizer.tokenize(instruction, of_frame if config.discrete_state_input else None)
        for of_frame in state
    ]
    data = {
        "image": images,
        "state": np.pad(state, ((0, 0), (0, config.action_dim - state.shape[1]))),
        "tokenized_prompt": np.stack([tokens for tokens, _ in prompts]),
        "tokenized_prompt_mask": np.stack([mask for _, mask in prompts]),
    }
    return Recording(
        instruction=instruction,
        frames=frames.tolist(),
        seconds=episode["timestamp"][frames],
        images=images,
        observation=Observation.from_dict(data),
    )
