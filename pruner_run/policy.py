"""A checkpoint as a policy: a robot's observation in, a chunk of its actions out.

The transforms are those of training, inverted at the output. Noise is drawn from named streams, so
that a policy's n-th answer depends on its seed and nothing else, in either backend.
"""

import dataclasses
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import numpy as np
from jaxtyping import Bool, Float

from pruner_run import backend as backends
from pruner_run import kept_bits, observation_check
from pruner_run.backend import Model, Pruned
from pruner_run.configs import TrainConfig
from pruner_run.data.examples import random_observation
from pruner_run.data.normalization import NormStats
from pruner_run.data.robots import RobotName
from pruner_run.data.transforms import (
    Sample,
    apply,
    flatten,
    input_transforms,
    output_transforms,
)
from pruner_run.policy_source import local, open_policy_source
from pruner_run.tokenizer import PromptTokenizer, load_tokenizer
from pruner_spec.buckets import PROMPT_BUCKETS, bucket
from pruner_spec.config import CAMERAS, Pi0Config
from pruner_spec.inference import InferenceSettings
from pruner_spec.observation import Observation
from pruner_spec.randomness import UINT32_LIMIT, Stream, normal, stream_key

BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
# Instructions up to about this many tokens meet a policy that is warm.
_INSTRUCTION_TOKENS = 32
# Of a normalised state's numbers: far beyond any robot's, far below where a model overflows.
_LARGEST = 1e12

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An observation as the model reads it.

    Attributes:
        inputs: the sample after the input transforms.
        milliseconds: that it took.
    """

    inputs: Sample
    milliseconds: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a policy's pruner chose for one observation.

    Attributes:
        cameras: C of them, those that the observation has.
        pruned: what the pruner read and kept, a batch of 1.
        diagnostics: by name, a number a pool: a camera, or, in the joint scope, all together.
    """

    cameras: tuple[str, ...]
    pruned: Pruned
    diagnostics: Mapping[str, Sequence[float]]


class Policy:
    """A model, and what stands between it and a robot.

    `prepare` may be called from several threads, `act` from one at a time.

    Attributes:
        config: the model's, and the data's that it was trained with.
        metadata: what a client is told: the config's own, the robot's keys, sizes, the pruning.
        max_batch: observations that the model is given at once.
    """

    def __init__(
        self,
        model: Model,
        config: TrainConfig,
        stats: NormStats,
        tokenizer: PromptTokenizer,
        *,
        backend: str,
        num_steps: int = 10,
        seed: int = 0,
        max_batch: int = 1,
    ) -> None:
        if not 1 <= max_batch <= BATCH_BUCKETS[-1]:
            raise ValueError(f"max_batch: expected 1..{BATCH_BUCKETS[-1]}, got {max_batch}")
        if num_steps < 1:
            raise ValueError(f"num_steps: expected at least 1, got {num_steps}")
        self.max_batch = max_batch
        self._model, self.config, self._num_steps, self._seed = model, config, num_steps, seed
        self._robot = config.data.of_robot
        self._inputs = input_transforms(config.data, config.model, stats, tokenizer)
        self._outputs = output_transforms(config.data, config.model, stats)
        self._state_dims = self._robot.state_dims or (min(len(stats.state), self._action_dim),)
        # Of generated data, without statistics, nothing says how long a state is.
        is_open = config.data.fake and self._robot.state_dims is None
        self._lengths = (None,) if is_open else self._state_dims
        self._answered = 0
        self.metadata: dict[str, Any] = {
            **config.policy_metadata,
            "config": config.name,
            "backend": backend,
            "robot": config.data.robot,
            "cameras": list(self._robot.cameras.values()),
            "state": dict(zip(self._robot.state, self._state_dims, strict=True)),
            "needs_prompt": config.data.default_prompt is None,
            "action_horizon": config.model.action_horizon,
            "action_dim": self._robot.action_dim or min(len(stats.actions), self._action_dim),
            "pruning": _described_pruning(config.model),
            "max_batch": max_batch,
        }

    @property
    def _action_dim(self) -> int:
        return self.config.model.action_dim

    @overload
    def infer(
        self, observation: Mapping[str, Any], *, noise: Float[np.ndarray, "H A"] | None = None
    ) -> dict[str, Any]: ...

    @overload
    def infer(
        self,
        observation: Sequence[Mapping[str, Any]],
        *,
        noise: Float[np.ndarray, "B H A"] | None = None,
    ) -> list[dict[str, Any]]: ...

    def infer(
        self,
        observation: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        noise: Float[np.ndarray, "*batch H A"] | None = None,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Actions for what a robot sees.

        Args:
            observation: openpi's dictionary for the robot, nested or with "/" in its keys; or
                several, as `infer_batch` takes them.
            noise: that the actions are denoised from, standard normal; drawn if not given.

        Returns:
            actions: [H, A], the robot's own, absolute and in its units.
            policy_timing: milliseconds: preprocess_ms, infer_ms (the model), postprocess_ms; and
                the batch_size that the model saw.
            pruning: patches kept, by camera and in all, and how many there were; of a model that
                prunes also which, see `kept_bits.kept_patches`.

        Raises:
            ValueError: something is missing in the observation or does not fit, or the model's
                actions are not finite.
        """
        if isinstance(observation, Sequence):
            return self.infer_batch(observation, noise=noise)
        given = None if noise is None else np.asarray(noise)[None]
        return self.act([self.prepare(observation)], given)[0]

    def infer_batch(
        self,
        observations: Sequence[Mapping[str, Any]],
        *,
        noise: Float[np.ndarray, "B H A"] | None = None,
    ) -> list[dict[str, Any]]:
        """`infer` for several observations, in batches of up to `max_batch`."""
        return self.act([self.prepare(observation) for observation in observations], noise)

    def prepare(self, observation: Mapping[str, Any]) -> Prepared:
        """The input transforms. Errors as `infer`."""
        started = time.perf_counter()
        if not isinstance(observation, Mapping):
            found = type(observation).__name__
            raise ValueError(f"observation: expected a dictionary, got {found}")
        sample = {key: each for key, each in flatten(observation).items() if key != "actions"}
        observation_check.check(sample, self._robot, self._lengths)
        inputs = apply(self._inputs, sample)
        if np.abs(inputs["state"]).max() > _LARGEST:
            raise ValueError(f"state: expected normalised numbers up to {_LARGEST:g}, got larger")
        return Prepared(inputs, _milliseconds(started))

    def act(
        self,
        prepared: Sequence[Prepared],
        noise: Float[np.ndarray, "B H A"] | None = None,
    ) -> list[dict[str, Any]]:
        """Answers as `infer` gives them, in the order of the observations."""
        noise = self._draw(len(prepared)) if noise is None else np.asarray(noise, np.float32)
        model = self.config.model
        shape = (len(prepared), model.action_horizon, model.action_dim)
        if noise.shape != shape:
            raise ValueError(f"noise: expected the shape {shape}, got {noise.shape}")
        starts = range(0, len(prepared), self.max_batch)
        parts = [slice(start, start + self.max_batch) for start in starts]
        return [
            answer for part in parts for answer in self._act_at_once(prepared[part], noise[part])
        ]

    def choose(self, prepared: Prepared) -> Choice:
        """Which patches are kept, and by what, of a policy that prunes."""
        assert self.config.model.prunes_at_inference
        self._model.sample_actions(_stacked([prepared]), self._zeros(1), 1)
        diagnostics = self._model.stats()["diagnostics"]
        return Choice(
            cameras=tuple(self._model.kept()),
            pruned=self._model.pruned(),
            diagnostics={name: np.ravel(values).tolist() for name, values in diagnostics.items()},
        )

    def warm_up(self) -> None:
        """Runs the model once for every size of a batch and length of a prompt that is likely.

        What the implicit selection will keep is not known: PyTorch captures the graphs of every
        number of patches, JAX compiles once more when it meets another one. With a budget there is
        nothing left to compile.
        """
        example = self.prepare(self.example())
        shortest = int(example.inputs["tokenized_prompt_mask"].sum())
        for size in self._batch_sizes():
            for length in self._prompt_lengths(shortest):
                inputs = example.inputs | {
                    "tokenized_prompt_mask": np.arange(self.config.model.max_token_len) < length
                }
                observation = _stacked([Prepared(inputs, 0.0)] * size)
                self._model.warm_up(observation, self._zeros(size), self._num_steps)

    def stages(self) -> dict[str, float]:
        """Milliseconds that the model takes for "vision", "pruning", "prefix" and "denoising",
        measured now, for one observation."""
        observation = _stacked([self.prepare(self.example())])
        return self._model.stages(observation, self._zeros(1), self._num_steps)

    def example(self) -> dict[str, Any]:
        """A random observation of the robot's, with the shortest of instructions."""
        return random_observation(self.metadata, np.random.default_rng(0), prompt="")

    def _zeros(self, size: int) -> np.ndarray:
        model = self.config.model
        return np.zeros((size, model.action_horizon, model.action_dim), np.float32)

    def _batch_sizes(self) -> list[int]:
        return [size for size in BATCH_BUCKETS if size < self.max_batch] + [self.max_batch]

    def _prompt_lengths(self, shortest: int) -> list[int]:
        most = self.config.model.max_token_len
        longest = min(shortest + _INSTRUCTION_TOKENS, most)
        ends = {bucket(length, PROMPT_BUCKETS, most) for length in range(shortest, longest + 1)}
        return sorted(ends)

    def _draw(self, count: int) -> np.ndarray:
        """Noise for the next answers."""
        model = self.config.model
        places = (self._answered + np.arange(count)) % UINT32_LIMIT
        self._answered += count
        shape = (model.action_horizon, model.action_dim)
        return normal(stream_key(self._seed, 0, Stream.NOISE, places), shape)

    def _act_at_once(self, prepared: Sequence[Prepared], noise: np.ndarray) -> list[dict[str, Any]]:
        """Padded to a size that is warm with copies of the last, which change nothing."""
        count = len(prepared)
        padding = bucket(count, self._batch_sizes()) - count
        started = time.perf_counter()
        observation = _stacked([*prepared, *[prepared[-1]] * padding])
        noise = np.concatenate([noise, noise[-1:].repeat(padding, axis=0)])
        stacking = _milliseconds(started) / count
        started = time.perf_counter()
        actions = self._model.sample_actions(observation, noise, self._num_steps)
        infer_ms = _milliseconds(started)
        kept = self._kept(observation)
        answers = []
        for row, each in enumerate(prepared):
            started = time.perf_counter()
            robots = self._robots_actions(each, actions[row])
            timing = {
                "preprocess_ms": each.milliseconds + stacking,
                "infer_ms": infer_ms,
                "postprocess_ms": _milliseconds(started),
                "batch_size": count,
            }
            shown = {c: rows[row] for c, rows in kept.items() if each.inputs[f"image_mask/{c}"]}
            answers.append(
                {"actions": robots, "policy_timing": timing, "pruning": self._pruning(shown)}
            )
        return answers

    def _robots_actions(self, prepared: Prepared, actions: np.ndarray) -> np.ndarray:
        if not np.isfinite(actions).all():
            raise ValueError("actions: expected finite numbers from the model, got others")
        given = {"state": prepared.inputs["state"], "actions": actions.astype(np.float64)}
        return apply(self._outputs, given)["actions"]

    def _kept(self, observation: Observation) -> dict[str, Bool[np.ndarray, "B N"]]:
        """Which patches were kept, by camera."""
        if self.config.model.prunes_at_inference:
            return self._model.kept()
        shape = (observation.batch_size, self.config.model.vision.num_patches)
        return {camera: np.ones(shape, bool) for camera in observation.image_masks}

    def _pruning(self, kept: Mapping[str, Bool[np.ndarray, "N"]]) -> dict[str, Any]:
        """What an answer says of it, in which no array may be: openpi's broker would cut it."""
        counts = {camera: int(each.sum()) for camera, each in kept.items()}
        patches = len(kept) * self.config.model.vision.num_patches
        said = {"kept": counts, "kept_total": sum(counts.values()), "patches": patches}
        if not self.config.model.prunes_at_inference:
            return said
        return said | {kept_bits.KEY: {c: kept_bits.packed(each) for c, each in kept.items()}}


def load(
    checkpoint_dir: str | os.PathLike[str],
    config: str | TrainConfig | None = None,
    backend: Literal["auto", "jax", "torch"] = "auto",
    *,
    pruning: bool | None = None,
    keep_ratio: float | None = None,
    keep_tokens: int | None = None,
    asset_id: str | None = None,
    tokenizer_path: str | os.PathLike[str] | None = None,
    default_prompt: str | None = None,
    dtype: str | None = None,
    num_steps: int = 10,
    seed: int = 0,
    max_batch: int = 1,
    robot: RobotName | None = None,
    inference: Literal["auto", "fast", "plain"] = "auto",
    settings: InferenceSettings | None = None,
    warm_up: bool = True,
) -> Policy:
    """A policy from a checkpoint.

    Args:
        checkpoint_dir: of a run of ours, openpi's JAX or PyTorch one, or LeRobot's π0.5 folder; of
            a "gs://..." of openpi's, what openpi's cache has.
        config: a training config or its name; None for what the checkpoint says itself.
        backend: "auto" for the framework that the weights were written by where it is installed,
            and else for the other.
        pruning: whether patches are pruned; None for as the config says, or, with a budget, yes.
        keep_ratio, keep_tokens: a budget a camera, in place of the config's.
        asset_id: whose statistics, in place of the config's.
        tokenizer_path: a SentencePiece model, in place of the config's.
        default_prompt: the instruction where an observation has none.
        dtype: of the computation, in place of the config's.
        num_steps: Euler steps.
        seed: of the noise.
        max_batch: observations that the model is given at once.
        robot: that the config must be of; None for any.
        inference: the way through the model: "fast" packs weights and captures what is launched,
            "plain" calls layer by layer. They differ by rounding. "auto" is fast on a GPU.
        settings: of the fast way; None for the defaults. The plain way has none.
        warm_up: see `Policy.warm_up`.

    Raises:
        FileNotFoundError: the checkpoint or the tokenizer is not there; says how to get the latter.
        ValueError: the checkpoint is none or is not the config's, has no such statistics, or an
            argument does not fit.
    """
    fast = _way(inference, settings)
    checkpoint_dir = local(checkpoint_dir)
    source = open_policy_source(checkpoint_dir, config, asset_id)
    data, model = source.config.data, source.config.model
    if robot is not None and data.robot != robot:
        raise ValueError(f"robot: expected a policy for {robot!r}, got one for {data.robot!r}")
    model = _overridden(model, pruning, keep_ratio, keep_tokens)
    if dtype is not None:
        model = dataclasses.replace(model, dtype=dtype)
    if default_prompt is not None:
        data = dataclasses.replace(data, default_prompt=default_prompt)
    chosen = dataclasses.replace(source.config, data=data, model=model)
    place = chosen.tokenizer_path if tokenizer_path is None else os.fspath(tokenizer_path)
    tokenizer = load_tokenizer(place, model)
    framework = backends.load(_chosen_backend(backend, source.framework))
    if fast is None and framework.device == "cpu" and settings is not None and settings.changed:
        logger.warning(
            "on a CPU the way is plain, and reads no settings: inference='fast' reads %s",
            _listed(settings),
        )
    policy = Policy(
        framework.model(model, checkpoint_dir, fast=fast, settings=settings),
        chosen,
        source.stats,
        tokenizer,
        backend=framework.name,
        num_steps=num_steps,
        seed=seed,
        max_batch=max_batch,
    )
    if framework.name == "jax" and model.prunes_at_inference and model.keep_budget is None:
        logger.warning(
            "without a budget the number of kept patches varies, and JAX compiles when it meets a "
            "new one: keep_tokens or keep_ratio gives answers in constant time"
        )
    if warm_up:
        started = time.perf_counter()
        policy.warm_up()
        logger.info("warmed up in %.1f s", time.perf_counter() - started)
    return policy


def _chosen_backend(backend: str, own: str) -> str:
    """Raises a ValueError if what is asked for is not installed, or, for "auto", nothing is."""
    if backend not in ("auto", "jax", "torch"):
        raise ValueError(f"backend: expected 'auto', 'jax' or 'torch', got {backend!r}")
    if backend != "auto":
        return backends.choose(backend)[0]  # type: ignore[arg-type]
    installed = backends.choose(None)
    return own if own in installed else installed[0]


def _way(inference: str, settings: InferenceSettings | None) -> bool | None:
    """As `Backend.model` asks for it.

    Raises:
        ValueError: there is none like it, or it has no such settings.
    """
    ways = {"auto": None, "fast": True, "plain": False}
    if inference not in ways:
        raise ValueError(f"inference: expected one of {list(ways)}, got {inference!r}")
    if inference == "plain" and settings is not None and settings.changed:
        expected = f"expected 'auto' or 'fast' with {_listed(settings)}"
        raise ValueError(f"inference: {expected}, got 'plain'")
    return ways[inference]


def _listed(settings: InferenceSettings) -> str:
    """Those that are not the defaults."""
    return ", ".join(f"{name}={value}" for name, value in settings.changed.items())


def _overridden(
    model: Pi0Config, pruning: bool | None, keep_ratio: float | None, keep_tokens: int | None
) -> Pi0Config:
    has_budget = keep_ratio is not None or keep_tokens is not None
    if pruning is False and has_budget:
        budget = {"keep_ratio": keep_ratio, "keep_tokens": keep_tokens}
        raise ValueError(f"pruning: expected no budget where nothing is pruned, got {budget}")
    if has_budget:
        return dataclasses.replace(
            model,
            token_pruning_enabled=True,
            token_prune_keep_ratio=keep_ratio,
            token_prune_keep_tokens=keep_tokens,
        )
    if pruning is None:
        return model
    return dataclasses.replace(model, token_pruning_enabled=pruning)


def _described_pruning(model: Pi0Config) -> dict[str, Any]:
    return {
        "enabled": model.prunes_at_inference,
        "keep_tokens": model.keep_budget,
        "patches": model.vision.num_patches,
        "scope": model.token_prune_scope,
    }


def _stacked(prepared: Sequence[Prepared]) -> Observation:
    """One batch of what was prepared."""

    def stack(key: str, dtype: Any = None) -> np.ndarray:
        return np.stack([each.inputs[key] for each in prepared], dtype=dtype)

    present = [c for c in CAMERAS if any(each.inputs[f"image_mask/{c}"] for each in prepared)]
    return Observation.from_dict(
        {
            "image": {camera: stack(f"image/{camera}") for camera in present},
            "image_mask": {camera: stack(f"image_mask/{camera}") for camera in present},
            "state": stack("state", np.float32),
            "tokenized_prompt": stack("tokenized_prompt"),
            "tokenized_prompt_mask": stack("tokenized_prompt_mask"),
        },
        keep_bytes=True,
    )


def _milliseconds(started: float) -> float:
    return 1e3 * (time.perf_counter() - started)
