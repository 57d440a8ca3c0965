"""A run's samples by number: of a dataset, or generated.

A sample's actions are those of its frame and of the H - 1 that follow in the same episode; beyond
the episode's end its last action is repeated, as LeRobot does.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from pruner_run.data.config import DataConfig
from pruner_run.data.hub import find_dataset
from pruner_run.data.images import ImageCache, resize_with_pad
from pruner_run.data.lerobot import LeRobotDataset
from pruner_run.data.normalization import NormStats
from pruner_run.data.transforms import Sample, apply, input_transforms
from pruner_run.tokenizer import PromptTokenizer
from pruner_spec.config import CAMERAS, IMAGE_SIZE, Pi0Config
from pruner_spec.randomness import Stream, fold_in, random_bits, stream_key, uniform

CACHE_BYTES = 1 << 30


class Inputs(Protocol):
    """The model's inputs by number, each a sample with actions; safe to use from threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def where(self, index: int) -> str:
        """What a sample is, for errors."""
        ...


class RobotSamples:
    """A dataset's frames as its robot shows them, with chunks of actions.

    Attributes:
        root: the dataset's folder.
        dataset: what is in there.
    """

    def __init__(self, data: DataConfig, horizon: int, *, cache_bytes: int = 0):
        """Opens the dataset and checks that it has what the config names.

        Raises:
            FileNotFoundError: there is no such dataset, or one of its files is missing.
            ValueError: the dataset is damaged, or has other features than the config needs.
        """
        self.root = find_dataset(data.repo_id)
        self.dataset = LeRobotDataset(self.root)
        self._horizon = horizon
        self._cache = ImageCache(cache_bytes)
        self._add_prompt = data.prompt_from_task and "prompt" not in data.sources
        cameras = {*data.of_robot.cameras.values()}
        sources = {k: v for k, v in data.sources.items() if k not in data.of_robot.spare}
        self._cameras = {key: source for key, source in sources.items() if key in cameras}
        numbers = {*data.of_robot.state, "actions"}
        self._numbers = {key: source for key, source in sources.items() if key in numbers}
        self._texts = {key: source for key, source in sources.items() if key == "prompt"}
        self._check(data)
        self._check_finite()
        ends = [episode.stop for episode in self.dataset.episodes]
        lengths = [len(episode) for episode in self.dataset.episodes]
        self._stops = np.repeat(ends, lengths)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        """A frame: images, numbers and, if the config asks for it, the dataset's instruction."""
        sample: Sample = {key: value[0] for key, value in self.numbers([index]).items()}
        task = self.dataset.tasks[int(self.dataset.columns["task_index"][index])]
        for key, source in self._texts.items():
            columns = self.dataset.columns
            sample[key] = columns[source][index] if source in columns else task
        if self._add_prompt:
            sample["prompt"] = task
        for key, camera in self._cameras.items():
            sample[key] = self._image(index, camera)
        return sample

    def numbers(self, indices: Sequence[int] | np.ndarray) -> Sample:
        """The numbers of n frames alone: parts of the state [n, S], actions [n, H, A]."""
        index = np.asarray(indices)
        following = index[:, None] + np.arange(self._horizon)
        chunk = np.minimum(following, self._stops[index, None] - 1)
        numbers = {}
        for key, source in self._numbers.items():
            values = self.dataset.columns[source]
            values = values[:, None] if values.ndim == 1 else values
            numbers[key] = values[chunk if key == "actions" else index]
        return numbers

    def where(self, index: int) -> str:
        """The frame's place in the dataset."""
        episode, frame = (
            int(self.dataset.columns[key][index]) for key in ("episode_index", "frame_index")
        )
        return f"{self.root}: frame {frame} of episode {episode}"

    def _image(self, index: int, camera: str) -> np.ndarray:
        """Resized here already, where a smaller image is kept than would be later."""
        return self._cache.get(
            (index, camera), lambda: resize_with_pad(self.dataset.image(index, camera))
        )

    def _check(self, data: DataConfig) -> None:
        robot, features = data.of_robot, self.dataset.features
        known = {*robot.cameras.values(), *robot.spare, *robot.state, "actions", "prompt"}
        if unknown := sorted(data.sources.keys() - known):
            raise ValueError(f"repack: expected keys of {sorted(known)}, got also {unknown}")
        for key in (*robot.state, "actions"):
            if key not in self._numbers:
                raise ValueError(f"repack: expected {key!r} among its keys, got {[*data.sources]}")
        for key, source in {**self._numbers, **self._cameras, **self._texts}.items():
            if source not in features and not (key in self._texts and source in ("task", "prompt")):
                raise ValueError(
                    f"{self.root}: expected the feature {source!r} for {key!r}, "
                    f"got {sorted(features)}; repack says which feature is which"
                )
        for source in self._cameras.values():
            if not features[source].is_camera:
                raise ValueError(
                    f"{self.root}: expected {source!r} to be a camera's, got {features[source]}"
                )
        for source in self._numbers.values():
            if features[source].is_camera or len(features[source].shape) != 1:
                raise ValueError(
                    f"{self.root}: expected {source!r} to be a vector, got {features[source]}"
                )

    def _check_finite(self) -> None:
        """As numbers of a damaged file may not be."""
        for source in self._numbers.values() if len(self) else ():
            values = self.dataset.columns[source]
            for index in np.argwhere(~np.isfinite(values))[:1]:
                found = values[tuple(index)]
                raise ValueError(f"{self.where(index[0])}: expected finite {source!r}, got {found}")


class DatasetInputs:
    """A dataset's frames as the model's inputs."""

    def __init__(
        self,
        data: DataConfig,
        model: Pi0Config,
        stats: NormStats,
        tokenizer: PromptTokenizer,
        *,
        cache_bytes: int = CACHE_BYTES,
    ):
        """Opens the dataset and makes its first sample, so that what does not fit shows at once.

        Raises:
            FileNotFoundError: there is no such dataset, or one of its files is missing.
            ValueError: the dataset is damaged, or does not fit the config, the model or the
                statistics.
        """
        self._samples = RobotSamples(data, model.action_horizon, cache_bytes=cache_bytes)
        self._transforms = input_transforms(data, model, stats, tokenizer)
        if not len(self):
            raise ValueError(f"{self._samples.root}: expected frames, got none")
        try:
            _ = self[0]
        except ValueError as error:
            raise ValueError(f"{self.where(0)}: {error}") from error

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return apply(self._transforms, self._samples[index])

    def where(self, index: int) -> str:
        return self._samples.where(index)


class GeneratedInputs:
    """Samples of the stream "debug_data", the same ones for every seed of a run.

    Every patch of an image is of one colour; prompts are of any length.
    """

    SIZE = 1024  # as openpi's fake dataset
    _VOCABULARY = 2048  # of its prompts
    _PATCHES = 16  # along each side of an image

    def __init__(self, model: Pi0Config):
        self._model = model

    def __len__(self) -> int:
        return self.SIZE

    def __getitem__(self, index: int) -> Sample:
        model = self._model
        key = stream_key(0, 0, Stream.DEBUG_DATA, [index])
        images, numbers, tokens = (fold_in(key, np.array([n], np.uint32)) for n in range(3))
        bits = random_bits(images, (len(CAMERAS), self._PATCHES, self._PATCHES, 3))[0]
        colours, patch = (bits >> 24).astype(np.uint8), IMAGE_SIZE // self._PATCHES
        pixels = colours.repeat(patch, axis=1).repeat(patch, axis=2)
        rows = uniform(numbers, (1 + model.action_horizon, model.action_dim))[0] * 2.0 - 1.0
        bits = random_bits(tokens, (1 + model.max_token_len,))[0]
        mask = np.arange(model.max_token_len) <= bits[0] % model.max_token_len
        ids = bits[1:] % min(self._VOCABULARY, model.paligemma.vocab_size)
        sample: Sample = {
            "state": rows[0],
            "actions": rows[1:],
            "tokenized_prompt": np.where(mask, ids, 0).astype(np.int32),
            "tokenized_prompt_mask": mask,
        }
        for camera, image in zip(CAMERAS, pixels, strict=True):
            sample |= {f"image/{camera}": image, f"image_mask/{camera}": np.bool_(True)}
        return sample

    def where(self, index: int) -> str:
        return f"generated sample {index}"
