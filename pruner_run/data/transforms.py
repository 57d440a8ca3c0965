"""What happens to a sample on its way to the model, and to its actions on the way back.

A sample is a dictionary, its keys paths with "/". A transform is a function from sample to sample
and changes none of its arguments. They are the same for training and for a policy, in openpi's
order: pick the robot's images and numbers, make actions relative, normalise, inject the default
prompt, resize, tokenise, pad. Numbers are computed in float64.

Those of state and actions alone take any leading dimensions: statistics are made of whole episodes.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pruner_run.data.config import DataConfig
from pruner_run.data.images import parse_image, resize_with_pad
from pruner_run.data.normalization import NormStats
from pruner_run.data.robots import (
    ALOHA_DIM,
    Robot,
    aloha_actions_from_pi,
    aloha_actions_to_pi,
    aloha_state_to_pi,
)
from pruner_run.tokenizer import PromptTokenizer
from pruner_spec.config import CAMERAS, Pi0Config

Sample = dict[str, Any]
Transform = Callable[[Sample], Sample]


def number_transforms(data: DataConfig) -> list[Transform]:
    """State and actions as the model knows them, before normalisation."""
    chain: list[Transform] = [PickNumbers(data.of_robot)]
    if _adapts(data):
        chain.append(adapt_to_pi)
    if data.delta_mask is not None:
        chain.append(DeltaActions(data.delta_mask))
    return chain


def input_transforms(
    data: DataConfig, model: Pi0Config, stats: NormStats, tokenizer: PromptTokenizer
) -> list[Transform]:
    """From a robot's sample, with or without actions, to the model's inputs.

    Raises:
        ValueError: the statistics have no quantiles where they are needed.
    """
    return [
        PickImages(data.of_robot),
        *number_transforms(data),
        Normalize(stats, data.uses_quantiles(model)),
        DefaultPrompt(data.default_prompt),
        resize_images,
        Tokenize(tokenizer, model.discrete_state_input),
        Pad(model.action_dim),
    ]


def output_transforms(data: DataConfig, model: Pi0Config, stats: NormStats) -> list[Transform]:
    """From the model's actions, with the state it was given, to the robot's."""
    chain: list[Transform] = [Unnormalize(stats, data.uses_quantiles(model))]
    if data.delta_mask is not None:
        chain.append(AbsoluteActions(data.delta_mask))
    chain.append(CutActions(data.of_robot.action_dim or len(stats.actions)))
    if _adapts(data):
        chain.append(adapt_from_pi)
    return chain


def _adapts(data: DataConfig) -> bool:
    return data.robot == "aloha" and data.adapt_to_pi


def apply(transforms: Sequence[Transform], sample: Sample) -> Sample:
    """The sample after all of them, one after the other."""
    for transform in transforms:
        sample = transform(sample)
    return sample


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Sample:
    """A client's nested dictionaries as one with paths."""
    flat: Sample = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@dataclasses.dataclass(frozen=True)
class PickImages:
    """The model's images and their masks; cameras that are missing are black and masked."""

    robot: Robot

    def __call__(self, sample: Sample) -> Sample:
        known = {*self.robot.cameras.values(), *self.robot.spare}
        folders = {key.partition("/")[0] for key in known} & {"image", "images"}
        found = {key for key in sample if key.partition("/")[0] in folders}
        if unknown := sorted(found - known):
            raise ValueError(f"images: expected some of {sorted(known)}, got {unknown}")
        images = {
            camera: parse_image(sample[key], key)
            for camera, key in self.robot.cameras.items()
            if key in sample
        }
        needed = {c: k for c, k in self.robot.cameras.items() if c not in self.robot.optional}
        missing = [key for camera, key in needed.items() if camera not in images]
        if missing or not images:
            expected = missing or sorted(self.robot.cameras.values())
            raise ValueError(f"images: expected {expected}, got {sorted(sample)}")
        black = np.zeros_like(next(iter(images.values())))
        kept = {key: value for key, value in sample.items() if key not in known}
        for camera in CAMERAS:
            kept[f"image/{camera}"] = images.get(camera, black)
            given = sample.get(f"image_mask/{camera}", True)
            kept[f"image_mask/{camera}"] = np.bool_(camera in images and given)
        return kept


@dataclasses.dataclass(frozen=True)
class PickNumbers:
    """The state, joined from its parts, and the actions if there are any, in float64."""

    robot: Robot

    def __call__(self, sample: Sample) -> Sample:
        if missing := [key for key in self.robot.state if key not in sample]:
            raise ValueError(f"state: expected {missing}, got {sorted(sample)}")
        parts = [np.atleast_1d(np.asarray(sample[key], np.float64)) for key in self.robot.state]
        kept = {key: value for key, value in sample.items() if key not in self.robot.state}
        kept["state"] = np.concatenate(parts, axis=-1)
        if "actions" in sample:
            kept["actions"] = np.asarray(sample["actions"], np.float64)
        return kept


def adapt_to_pi(sample: Sample) -> Sample:
    """ALOHA's joints and grippers as the base models know them."""
    for key in ("state", "actions"):
        if key in sample and sample[key].shape[-1] != ALOHA_DIM:
            found = sample[key].shape[-1]
            raise ValueError(f"adapt_to_pi: expected {key} of {ALOHA_DIM} numbers, got {found}")
    adapted = sample | {"state": aloha_state_to_pi(sample["state"])}
    if "actions" in sample:
        adapted["actions"] = aloha_actions_to_pi(sample["actions"])
    return adapted


def adapt_from_pi(sample: Sample) -> Sample:
    """Actions of the base models as ALOHA's."""
    return sample | {"actions": aloha_actions_from_pi(sample["actions"])}


@dataclasses.dataclass(frozen=True)
class DeltaActions:
    """Actions relative to the state, where the mask says so."""

    mask: tuple[bool, ...]

    def __call__(self, sample: Sample) -> Sample:
        if "actions" not in sample:
            return sample
        return sample | {"actions": sample["actions"] - _offsets(sample, self.mask)}


@dataclasses.dataclass(frozen=True)
class AbsoluteActions:
    """The inverse of `DeltaActions`."""

    mask: tuple[bool, ...]

    def __call__(self, sample: Sample) -> Sample:
        return sample | {"actions": sample["actions"] + _offsets(sample, self.mask)}


def _offsets(sample: Sample, mask: tuple[bool, ...]) -> np.ndarray:
    """What actions [..., H, A] are relative to, [..., 1, A]: the state, or 0."""
    state, actions = sample["state"], sample["actions"]
    if len(mask) > min(state.shape[-1], actions.shape[-1]):
        found = f"{state.shape[-1]} and {actions.shape[-1]}"
        raise ValueError(
            f"delta_action_mask: expected state and actions of {len(mask)} numbers, got {found}"
        )
    offsets = np.zeros((*state.shape[:-1], 1, actions.shape[-1]), actions.dtype)
    offsets[..., 0, : len(mask)] = np.where(mask, state[..., : len(mask)], 0.0)
    return offsets


@dataclasses.dataclass(frozen=True)
class Normalize:
    """State and actions by the statistics."""

    stats: NormStats
    quantiles: bool

    def __post_init__(self) -> None:
        for key, stats in vars(self.stats).items():
            if self.quantiles and (stats.q01 is None or stats.q99 is None):
                raise ValueError(f"{key}: expected statistics with q01 and q99, got mean and std")

    def __call__(self, sample: Sample) -> Sample:
        changed = {}
        for key, stats in vars(self.stats).items():
            if key in sample:
                try:
                    changed[key] = stats.normalize(sample[key], quantiles=self.quantiles)
                except ValueError as error:
                    raise ValueError(f"{key}: {error}") from error
        return sample | changed


@dataclasses.dataclass(frozen=True)
class Unnormalize:
    """The inverse of `Normalize`; numbers that are padding stay."""

    stats: NormStats
    quantiles: bool

    def __call__(self, sample: Sample) -> Sample:
        return sample | {
            key: stats.unnormalize(np.asarray(sample[key], np.float64), quantiles=self.quantiles)
            for key, stats in vars(self.stats).items()
        }


@dataclasses.dataclass(frozen=True)
class DefaultPrompt:
    """An instruction where there is none."""

    prompt: str | None

    def __call__(self, sample: Sample) -> Sample:
        return sample if self.prompt is None else {"prompt": self.prompt} | sample


def resize_images(sample: Sample) -> Sample:
    """Images of the model's size."""
    keys = [f"image/{camera}" for camera in CAMERAS]
    return sample | {key: resize_with_pad(sample[key]) for key in keys}


@dataclasses.dataclass(frozen=True)
class Tokenize:
    """The instruction, and where the model reads it there the state, as tokens."""

    tokenizer: PromptTokenizer
    discrete_state: bool

    def __call__(self, sample: Sample) -> Sample:
        kept = dict(sample)
        prompt = kept.pop("prompt", None)
        if prompt is None:
            raise ValueError(
                "prompt: expected an instruction: a default_prompt, or prompt_from_task for those "
                "of the dataset; got none"
            )
        state = sample["state"] if self.discrete_state else None
        tokens, mask = self.tokenizer.tokenize(str(np.asarray(prompt).item()), state)
        return kept | {"tokenized_prompt": tokens, "tokenized_prompt_mask": mask}


@dataclasses.dataclass(frozen=True)
class Pad:
    """State and actions with zeros up to the model's number."""

    action_dim: int

    def __call__(self, sample: Sample) -> Sample:
        padded = {}
        for key in ("state", "actions"):
            if key not in sample:
                continue
            room = self.action_dim - sample[key].shape[-1]
            if room < 0:
                found = sample[key].shape[-1]
                raise ValueError(
                    f"{key}: expected at most action_dim={self.action_dim} numbers, got {found}"
                )
            widths = [(0, 0)] * (sample[key].ndim - 1) + [(0, room)]
            padded[key] = np.pad(sample[key], widths)
        return sample | padded


@dataclasses.dataclass(frozen=True)
class CutActions:
    """Actions without their padding, and nothing else."""

    action_dim: int

    def __call__(self, sample: Sample) -> Sample:
        return {"actions": sample["actions"][..., : self.action_dim]}
