"""From an observation to actions, at inference.

What the host must know to choose static shapes is settled before anything is computed: which
cameras are there and how long the prompts are. The implicit selection is the one thing that only
the device knows; it costs one small read a call. A budget costs none.
"""

import dataclasses
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pruner_spec.buckets import PATCH_BUCKETS, bucket
from pruner_spec.config import CAMERAS
from pruner_spec.flow import euler_step, euler_time_embeddings
from pruner_spec.observation import EncodingPlan, Observation, check_actions, plan_encoding
from pruner_spec.stats import kept_counts
from pruner_torch import kernels_plain
from pruner_torch.diagnostics import diagnose
from pruner_torch.gemma import KVCache
from pruner_torch.layers import constant, wide
from pruner_torch.pruner import Selection, most_kept

if TYPE_CHECKING:
    from pruner_torch.pi0 import Encoded, Pi0, Prefix


class Stages(Protocol):
    """How the two halves of a call are computed, the host's one look at the device between them."""

    def encode(self, observation: Observation, plan: EncodingPlan) -> "tuple[Encoded, Selection]":
        """Tokens of what the plan names, and which patches are kept.

        The observation is as it was given: NumPy's arrays stay so, until they are copied.
        """
        ...

    def act(
        self,
        encoded: "Encoded",
        selection: Selection,
        state: Float[Tensor, "B A"],
        noise: Float[Tensor, "B H A"],
        capacity: int | None,
        num_steps: int,
    ) -> Float[Tensor, "B H A"]:
        """Actions, from at most `capacity` patches a sample; None for all as they stand.

        State and noise may be on the host.
        """
        ...

    def expected(self, encoded: "Encoded") -> int | None:
        """The capacity to try before the device has told of it; None for none."""
        ...

    # The same in smaller parts, to be measured one by one.

    def embed(self, observation: Observation, plan: EncodingPlan) -> "Encoded":
        """`encode` without the selection."""
        ...

    def select(self, encoded: "Encoded") -> Selection:
        """Which patches are kept."""
        ...

    def prune(self, encoded: "Encoded", selection: Selection, capacity: int | None) -> "Prefix":
        """The prefix of those patches, and of the prompt."""
        ...

    def prefill(self, prefix: "Prefix") -> Any:
        """Keys and values of the prefix."""
        ...

    def denoise(
        self,
        prefix: "Prefix",
        cache: Any,
        state: Float[Tensor, "B A"],
        noise: Float[Tensor, "B H A"],
        num_steps: int,
    ) -> Float[Tensor, "B H A"]:
        """Actions, from the keys and values that `prefill` gave."""
        ...


class PlainStages:
    """The model's own layers, one after the other."""

    def __init__(self, model: "Pi0") -> None:
        self._model = model

    def encode(self, observation: Observation, plan: EncodingPlan) -> "tuple[Encoded, Selection]":
        encoded = self.embed(observation, plan)
        return encoded, self.select(encoded)

    def act(
        self,
        encoded: "Encoded",
        selection: Selection,
        state: Float[Tensor, "B A"],
        noise: Float[Tensor, "B H A"],
        capacity: int | None,
        num_steps: int,
    ) -> Float[Tensor, "B H A"]:
        prefix = self.prune(encoded, selection, capacity)
        return self.denoise(prefix, self.prefill(prefix), state, noise, num_steps)

    def expected(self, encoded: "Encoded") -> int | None:
        return None

    def embed(self, observation: Observation, plan: EncodingPlan) -> "Encoded":
        observation = self._model.prepare(observation)
        return self._model.encode(observation, plan.cameras, plan.prompt_length)

    def select(self, encoded: "Encoded") -> Selection:
        return self._model.select(encoded, kernels_plain)

    def prune(self, encoded: "Encoded", selection: Selection, capacity: int | None) -> "Prefix":
        return prune(self._model, encoded, selection, capacity, kernels_plain)

    def prefill(self, prefix: "Prefix") -> KVCache:
        return self._model.prefill(prefix)

    def denoise(
        self,
        prefix: "Prefix",
        cache: KVCache,
        state: Float[Tensor, "B A"],
        noise: Float[Tensor, "B H A"],
        num_steps: int,
    ) -> Float[Tensor, "B H A"]:
        state, noise = (x.to(self._model.device) for x in (state, noise))
        return denoise(self._model, prefix, cache, state, noise, num_steps)


@torch.no_grad()
def sample_actions(
    model: "Pi0",
    observation: Observation,
    noise: Float[Tensor, "B H A"],
    num_steps: int = 10,
    stages: Stages | None = None,
) -> Float[Tensor, "B H A"]:
    """Actions, denoised from the noise by `num_steps` Euler steps.

    Cameras that no sample has are not encoded, and prompt padding beyond the bucket of the longest
    prompt is dropped; neither changes the result. A sample's actions do not depend on the others.

    Args:
        model: its config says whether and how patches are pruned.
        observation: of NumPy arrays or tensors. Masks that are NumPy arrays cost no transfer.
        noise: standard normal.
        num_steps: Euler steps from time 1 to 0.
        stages: None for the model's own layers; see `inference.Sampler` for the fast ones.

    Raises:
        ValueError: an argument does not fit the config.
        NonFiniteScoresError: the implicit selection met scores that are not finite. With a budget
            the sample's actions are NaN, as they would be without pruning.
    """
    check_actions("noise", noise, observation.batch_size, model.config)
    stages = PlainStages(model) if stages is None else stages
    observation.check(model.config)
    plan = plan_of(observation)
    state, noise = (torch.as_tensor(x).to(wide(model.dtype)) for x in (observation.state, noise))
    encoded, selection = stages.encode(observation, plan)
    if model.token_pruning_enabled:
        model.record.last = (plan.cameras, encoded, selection)
    # Most calls keep as many as the last one, within the bucket: no need to wait for the device to
    # say so. A guess that was wrong is computed again, so that no result depends on the last call.
    inputs = (encoded, selection, state, noise)
    guess = stages.expected(encoded) if is_counted(model) else None
    actions = None if guess is None else stages.act(*inputs, guess, num_steps)
    room = capacity(model, encoded, selection)
    if actions is not None and room == guess:
        return actions
    return stages.act(*inputs, room, num_steps)


def plan_of(observation: Observation) -> EncodingPlan:
    """Which cameras and how much of the prompt to encode; when traced, all."""
    if torch.compiler.is_compiling():
        return EncodingPlan(CAMERAS, observation.tokenized_prompt.shape[1])
    both: Any = joined_masks(observation, CAMERAS)
    both = both.cpu().numpy() if isinstance(both, Tensor) else both  # one transfer
    return plan_encoding(both[:, : len(CAMERAS)], both[:, len(CAMERAS) :])


def joined_masks(
    observation: Observation, cameras: Sequence[str], prompt_length: int | None = None
) -> Bool[Tensor, "B C+L"] | Bool[np.ndarray, "B C+L"]:
    """Masks of cameras and of the prompt, up to a length; NumPy's where all are."""
    masks = [observation.image_masks[camera][:, None] for camera in cameras]
    masks.append(observation.tokenized_prompt_mask[:, :prompt_length])
    devices = [mask.device for mask in masks if isinstance(mask, Tensor)]
    if not devices:
        return np.concatenate(masks, axis=1)
    return torch.cat([torch.as_tensor(mask, device=devices[0]) for mask in masks], dim=1)


def prune(
    model: "Pi0",
    encoded: "Encoded",
    selection: Selection,
    capacity: int | None,
    operations: ModuleType = kernels_plain,
) -> "Prefix":
    """The prefix at inference, packed to `capacity`; None where the config does not prune."""
    if capacity is None:
        return model.assemble(encoded)
    return model.prune(encoded, selection, capacity, operations)


def is_counted(model: "Pi0") -> bool:
    """Whether it is the device that knows how many patches are kept."""
    return model.config.prunes_at_inference and model.config.keep_budget is None


def capacity(model: "Pi0", encoded: "Encoded", selection: Selection) -> int | None:
    """M, the static number of patches after pruning, for a batch; None for all as they stand."""
    if not model.config.prunes_at_inference:
        return None
    cameras, patches = encoded.patches.shape[1:3]
    if model.config.keep_budget is not None:
        return model.config.keep_budget * cameras
    limit = cameras * patches
    return bucket(most_kept(selection, limit), PATCH_BUCKETS, limit)


def capacities(model: "Pi0", cameras: int) -> tuple[int | None, ...]:
    """All that `capacity` may give for so many cameras."""
    config = model.config
    if not config.prunes_at_inference:
        return (None,)
    if config.keep_budget is not None:
        return (config.keep_budget * cameras,)
    limit = cameras * config.vision.num_patches
    return (*(size for size in PATCH_BUCKETS if size < limit), limit)


def denoise(
    model: "Pi0",
    prefix: "Prefix",
    cache: KVCache,
    state: Float[Tensor, "B A"],
    noise: Float[Tensor, "B H A"],
    num_steps: int,
) -> Float[Tensor, "B H A"]:
    """Euler steps from the noise at time 1 to the actions at time 0."""
    step = float(euler_step(num_steps))
    width = model.config.action_expert.width
    x = noise
    for embedding in constant(euler_time_embeddings, (num_steps, width), x.dtype, x.device):
        x = x + step * model.velocity(prefix, cache, state, x, embedding)
    return x


def stats(model: "Pi0") -> dict[str, Any]:
    """How the last sampled batch was pruned.

    Returns:
        enabled: whether the config prunes.
        noise_scale: of the training noise.
        and, after a batch was sampled with pruning enabled: kept_per_sample, kept_per_camera,
        nonfinite_scores, and diagnostics, `Diagnostics` as lists: [B][C] in the camera
        scope, [B][1] in the joint one.
    """
    result: dict[str, Any] = {
        "enabled": model.token_pruning_enabled,
        "noise_scale": model.token_pruner_noise_scale,
    }
    if model.record.last is None:
        return result
    cameras, encoded, selection = model.record.last
    batch, _, patches = encoded.patches.shape[:3]
    kept = selection.kept.reshape(batch, -1, patches).cpu().numpy()
    found = diagnose(*model.pools(encoded))
    by_pool = {
        field.name: getattr(found, field.name).reshape(batch, -1).tolist()
        for field in dataclasses.fields(found)
    }
    nonfinite = selection.nonfinite.cpu().numpy()
    return result | kept_counts(cameras, kept, nonfinite) | {"diagnostics": by_pool}
