"""π0 and π0.5: a vision-language model and an action expert that denoises a chunk of actions.

Randomness is drawn outside and passed in. The way of an observation:
`encode` (images and prompt to tokens) -> `select` or `relax` (the pruner) -> `assemble` (the
prefix) -> Gemma, with the suffix of noisy actions, -> velocities.

Dimension letters: B batch, C cameras, N patches, L prompt tokens, S prefix, H action horizon,
A action dim, D width of the prefix, E width of the suffix.
"""

import dataclasses
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pruner_spec import sequence
from pruner_spec.config import CAMERAS, Pi0Config
from pruner_spec.flow import time_frequencies
from pruner_spec.observation import Observation, check_actions
from pruner_spec.parameters import initial_parameters
from pruner_spec.stats import PrunerRecord
from pruner_spec.training import GradientCheckpointing
from pruner_torch import checkpoint, kernels, kernels_plain, sampling
from pruner_torch.gemma import Gemma, KVCache
from pruner_torch.layers import Linear, as_float, constant, wide
from pruner_torch.pruner import ImageTokenPruner, PrunedPatches, Selection, pack
from pruner_torch.recomputation import optimized
from pruner_torch.siglip import SigLip

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Images and prompt as tokens, before pruning.

    Attributes:
        patches: [B, C, N, D].
        camera_mask: bool [B, C], the cameras that are there.
        prompt: [B, L, D].
        prompt_mask: bool [B, L].
    """

    patches: Float[Tensor, "B C N D"]
    camera_mask: Bool[Tensor, "B C"]
    prompt: Float[Tensor, "B L D"]
    prompt_mask: Bool[Tensor, "B L"]


@dataclasses.dataclass(frozen=True)
class Prefix:
    """What the language model reads: the patches, then the prompt.

    Attributes:
        tokens: [B, S, D].
        valid: bool [B, S].
        positions: int [B, S], those of the unpruned prefix.
        length: int [B], valid tokens of the unpruned prefix, where the suffix's positions begin.
    """

    tokens: Float[Tensor, "B S D"]
    valid: Bool[Tensor, "B S"]
    positions: Int[Tensor, "B S"]
    length: Int[Tensor, "B"]


@dataclasses.dataclass(frozen=True)
class Suffix:
    """What the action expert reads.

    Attributes:
        tokens: [B, H, E], in π0 with the state token before them.
        condition: [B, E], of the adaptive norms; None in π0.
    """

    tokens: Float[Tensor, "B H E"]
    condition: Float[Tensor, "B E"] | None


@dataclasses.dataclass(frozen=True)
class LossTerms:
    """A batch's loss, and what it was computed from.

    Attributes:
        loss: [B, H].
        encoded: the tokens before pruning.
        pruned: the patches that the prefix was made of; None where none were pruned.
    """

    loss: Float[Tensor, "B H"]
    encoded: Encoded
    pruned: PrunedPatches | None


class Pi0(nn.Module):
    """π0 or π0.5, with or without token pruning, as its config says.

    Args:
        config: sizes and settings.
        seed: of the initial weights, the same ones in both backends. None leaves the parameters
            without memory, on the device "meta", for `checkpoint.assign`.
        device: where the parameters are; None for PyTorch's default.
    """

    def __init__(
        self,
        config: Pi0Config,
        *,
        seed: int | None = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        device = torch.get_default_device() if device is None else torch.device(device)
        self.config = config
        self.dtype = getattr(torch, config.dtype)
        self.gradient_checkpointing: GradientCheckpointing = "none"
        self.compiled_training = False
        self.pruner = ImageTokenPruner(config.keep_budget, config.token_prune_min_keep)
        self.record = PrunerRecord()
        width, action_dim = config.action_expert.width, config.action_dim
        with torch.device("meta"):
            self.vision = SigLip(config.vision, config.paligemma.width)
            self.gemma = Gemma(config)
            self.action_in_proj = Linear(action_dim, width)
            if config.pi05:
                self.time_mlp_in = Linear(width, width)
                self.time_mlp_out = Linear(width, width)
            else:
                self.state_proj = Linear(action_dim, width)
                self.action_time_mlp_in = Linear(2 * width, width)
                self.action_time_mlp_out = Linear(width, width)
            self.action_out_proj = Linear(width, action_dim)
        if seed is not None:
            checkpoint.assign(self, initial_parameters(config, seed), device=device)
        if config.token_pruning_enabled:
            logger.info(
                "Enabled LightVLA-style token pruning (hidden_size=%d)", config.paligemma.width
            )

    @property
    def token_pruning_enabled(self) -> bool:
        return self.config.token_pruning_enabled

    @property
    def token_pruner_noise_scale(self) -> float:
        """What the one who draws the pruner's noise multiplies it by."""
        override = self.record.noise_scale
        return self.config.token_prune_noise_scale if override is None else override

    def set_token_pruner_noise_scale(self, noise_scale: float | None) -> None:
        """Overrides the config's noise scale; None goes back to it."""
        self.record.set_noise_scale(noise_scale)

    def get_token_pruning_stats(self) -> dict[str, Any]:
        """How the last sampled batch was pruned; computed only here. See `sampling.stats`."""
        return sampling.stats(self)

    def encode(
        self,
        observation: Observation,
        cameras: Sequence[str] = CAMERAS,
        prompt_length: int | None = None,
    ) -> Encoded:
        """Tokens of the images and of the prompt.

        Args:
            observation: of tensors, on the model's device.
            cameras: those to encode.
            prompt_length: tokens of the prompt to encode; None for all.
        """
        images = [observation.images[camera] for camera in cameras]
        masks = [observation.image_masks[camera] for camera in cameras]
        return self.embed(
            torch.stack(images, dim=1),
            torch.stack(masks, dim=1),
            observation.tokenized_prompt[:, :prompt_length],
            observation.tokenized_prompt_mask[:, :prompt_length],
        )

    def embed(
        self,
        images: Float[Tensor, "B C 224 224 3"],
        camera_mask: Bool[Tensor, "B C"],
        prompt: Int[Tensor, "B L"],
        prompt_mask: Bool[Tensor, "B L"],
    ) -> Encoded:
        """Tokens of any number of cameras, all in one vision batch, and of a prompt."""
        patches = self.vision(
            images.flatten(0, 1), self.dtype, self.gradient_checkpointing, self.compiled_training
        )
        return Encoded(
            patches=patches.reshape(*images.shape[:2], *patches.shape[1:]),
            camera_mask=camera_mask,
            prompt=self.gemma.embedder(prompt, self.dtype),
            prompt_mask=prompt_mask,
        )

    def pools(self, encoded: Encoded) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Patches, task, task mask and patch mask of each pool that is pruned on its own.

        A pool is a camera of a sample, or, in the joint scope, a sample.
        """
        batch, cameras, patches = encoded.patches.shape[:3]
        if self.config.token_prune_scope == "joint":
            patch_mask = _each(encoded.camera_mask, patches)
            return encoded.patches.flatten(1, 2), encoded.prompt, encoded.prompt_mask, patch_mask
        return (
            encoded.patches.flatten(0, 1),
            encoded.prompt[:, None].expand(-1, cameras, -1, -1).flatten(0, 1),
            encoded.prompt_mask[:, None].expand(-1, cameras, -1).flatten(0, 1),
            encoded.camera_mask.reshape(batch * cameras, 1).expand(-1, patches),
        )

    def select(self, encoded: Encoded, operations: ModuleType = kernels_plain) -> Selection:
        """The patches kept at inference, over all cameras: `kept` is bool [B, C*N]."""
        batch, _, patches = encoded.patches.shape[:3]
        if not self.config.prunes_at_inference:
            everything = _each(encoded.camera_mask, patches)
            return Selection.of(everything, everything.new_zeros(batch, dtype=torch.int64))
        budget = None
        if self.config.token_prune_scope == "joint" and self.config.keep_budget is not None:
            budget = self.config.keep_budget * encoded.camera_mask.sum(dim=-1)
        pools = self.pools(encoded)
        selection = self.pruner.select(*pools, budget=budget, operations=operations)
        return Selection(
            kept=selection.kept.reshape(batch, -1), counts=selection.counts.reshape(batch, -1, 2)
        )

    def relax(
        self, encoded: Encoded, noise: Float[Tensor, "*pools N N"] | None = None
    ) -> PrunedPatches:
        """The patches of training, over all cameras: M = C*N of them, with repetitions.

        Args:
            encoded: the tokens.
            noise: added to the scores: [B, C, N, N], or [B, C*N, C*N] in the joint scope.
        """
        pools = self.pools(encoded)
        count, size = pools[0].shape[:2]
        if noise is not None:
            noise = noise.reshape(count, size, size)
        relax = optimized(ImageTokenPruner.relax, self.compiled_training)
        pruned = relax(self.pruner, *pools, noise=noise)
        batch = encoded.patches.shape[0]
        pool_start = torch.arange(count // batch, device=pruned.index.device) * size
        index = pruned.index.reshape(batch, -1, size) + pool_start[:, None]
        return PrunedPatches(
            tokens=pruned.tokens.reshape(batch, -1, pruned.tokens.shape[-1]),
            index=index.reshape(batch, -1),
            valid=pruned.valid.reshape(batch, -1),
        )

    def assemble(self, encoded: Encoded, pruned: PrunedPatches | None = None) -> Prefix:
        """The prefix of the pruned patches, or of all, and the prompt."""
        patches = encoded.patches.flatten(1, 2)
        patch_mask = _each(encoded.camera_mask, encoded.patches.shape[2])
        valid = torch.cat([patch_mask, encoded.prompt_mask], dim=1)
        positions = sequence.positions(valid)
        length = valid.sum(dim=-1)
        if pruned is None:
            tokens = torch.cat([patches, encoded.prompt], dim=1)
            return Prefix(tokens=tokens, valid=valid, positions=positions, length=length)
        patch_positions = torch.take_along_dim(positions, pruned.index, dim=1)
        prompt_positions = positions[:, patches.shape[1] :]
        return Prefix(
            tokens=torch.cat([pruned.tokens, encoded.prompt], dim=1),
            valid=torch.cat([pruned.valid, encoded.prompt_mask], dim=1),
            positions=torch.cat([patch_positions, prompt_positions], dim=1),
            length=length,
        )

    def prune(
        self,
        encoded: Encoded,
        selection: Selection,
        capacity: int,
        operations: ModuleType = kernels_plain,
    ) -> Prefix:
        """The prefix of the selected patches, packed to `capacity`, and the prompt."""
        patches = encoded.patches
        if operations is kernels and not patches.requires_grad and kernels.available(patches):
            from pruner_torch import kernels_pruner

            masks = encoded.camera_mask, encoded.prompt_mask
            chosen = selection.kept, selection.counts
            with torch.cuda.device_of(patches):
                packed = kernels_pruner.pack_prefix(
                    patches, encoded.prompt, *masks, *chosen, capacity
                )
            return Prefix(*packed)
        return self.assemble(encoded, pack(patches.flatten(1, 2), selection, capacity))

    def embed_prefix(
        self,
        observation: Observation,
        pruner_noise: Float[Tensor, "*pools N N"] | None = None,
        train: bool = False,
    ) -> Prefix:
        """The prefix, pruned as the config says; its length is static.

        Args:
            observation: of tensors, on the model's device.
            pruner_noise: in training, added to the scores: uniform in [0, 1) times the noise
                scale; [B, C, N, N], or [B, C*N, C*N] in the joint scope.
            train: soft selection, with a gradient to the scores.
        """
        encoded = self.encode(observation)
        return self.assemble(encoded, self._pruned(encoded, pruner_noise, train))

    def _pruned(
        self, encoded: Encoded, noise: Float[Tensor, "*pools N N"] | None, train: bool
    ) -> PrunedPatches | None:
        """The patches as the config prunes them, at a static length; None for all."""
        if train and self.config.token_pruning_enabled:
            return self.relax(encoded, noise)
        if noise is not None:
            raise ValueError(
                "pruner_noise: expected None unless token pruning is enabled and train=True"
            )
        if not self.config.prunes_at_inference:
            return None
        cameras, patches = encoded.patches.shape[1:3]
        budget = self.config.keep_budget
        capacity = cameras * (patches if budget is None else budget)
        selection = self.select(encoded, kernels_plain)
        return pack(encoded.patches.flatten(1, 2), selection, capacity)

    def embed_suffix(
        self,
        state: Float[Tensor, "B A"],
        noisy_actions: Float[Tensor, "B H A"],
        time: Float[Tensor, "B"],
    ) -> Suffix:
        """The action expert's tokens at a flow matching time, 1 for noise and 0 for actions."""
        return self.embed_suffix_at(state, noisy_actions, self.embed_time(time))

    def embed_suffix_at(
        self,
        state: Float[Tensor, "B A"],
        noisy_actions: Float[Tensor, "B H A"],
        embedding: Float[Tensor, "B E"],
    ) -> Suffix:
        """The action expert's tokens for an embedded time."""
        actions = self.action_in_proj(noisy_actions)
        if self.config.pi05:
            condition = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(embedding))))
            return Suffix(tokens=actions.to(self.dtype), condition=condition)
        timed = torch.cat([actions, embedding[:, None].expand_as(actions)], dim=-1)
        actions = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(timed)))
        tokens = torch.cat([self.state_proj(state)[:, None], actions], dim=1)
        return Suffix(tokens=tokens.to(self.dtype), condition=None)

    def embed_time(self, time: Float[Tensor, "B"]) -> Float[Tensor, "B E"]:
        """Sines and cosines of the time; see `pruner_spec.flow.time_embedding`."""
        width = self.config.action_expert.width
        angles = time[:, None] * constant(time_frequencies, (width,), time.dtype, time.device)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def compute_loss(
        self,
        observation: Observation,
        actions: Float[Tensor, "B H A"],
        noise: Float[Tensor, "B H A"],
        time: Float[Tensor, "B"],
        pruner_noise: Float[Tensor, "*pools N N"] | None = None,
        train: bool = True,
    ) -> Float[Tensor, "B H"]:
        """Flow matching's squared error, a mean over the action's dimensions.

        Args:
            observation: of NumPy arrays or tensors.
            actions: normalised, zero-padded to A.
            noise: standard normal.
            time: in (0, 1]; 1 is all noise.
            pruner_noise: see `embed_prefix`.
            train: soft selection of patches; False for the loss of the model as it is deployed.

        Raises:
            ValueError: an argument does not fit the config.
        """
        return self.loss_terms(observation, actions, noise, time, pruner_noise, train).loss

    def loss_terms(
        self,
        observation: Observation,
        actions: Float[Tensor, "B H A"],
        noise: Float[Tensor, "B H A"],
        time: Float[Tensor, "B"],
        pruner_noise: Float[Tensor, "*pools N N"] | None = None,
        train: bool = True,
    ) -> LossTerms:
        """`compute_loss`, with what it was computed from."""
        observation = self.prepare(observation)
        batch = observation.batch_size
        actions, noise, time = (self._as_wide(x) for x in (actions, noise, time))
        check_actions("actions", actions, batch, self.config)
        check_actions("noise", noise, batch, self.config)
        if pruner_noise is not None:
            pruner_noise = self._as_wide(pruner_noise)
        fraction = time[:, None, None]
        noisy_actions = fraction * noise + (1 - fraction) * actions
        encoded = self.encode(observation)
        pruned = self._pruned(encoded, pruner_noise, train)
        prefix = self.assemble(encoded, pruned)
        suffix = self.embed_suffix(observation.state, noisy_actions, time)
        _, output = self.joint(prefix, suffix)
        loss = (self._velocity(output) - (noise - actions)).square().mean(dim=-1)
        return LossTerms(loss=loss, encoded=encoded, pruned=pruned)

    def attention(self, prefix: Prefix) -> tuple[Bool[Tensor, "B S+H S+H"], Int[Tensor, "B S+H"]]:
        """Mask and positions of the whole sequence, prefix and suffix."""
        batch, length = prefix.valid.shape
        place = torch.arange(length + self.config.suffix_length, device=prefix.valid.device)
        suffix_valid = prefix.valid.new_ones(batch, self.config.suffix_length)
        valid = torch.cat([prefix.valid, suffix_valid], dim=1)
        mask = sequence.attention_mask(valid, sequence.block_start(self.config, place, length))
        suffix_positions = prefix.length[:, None] + place[: self.config.suffix_length]
        return mask, torch.cat([prefix.positions, suffix_positions], dim=1)

    def joint(
        self, prefix: Prefix, suffix: Suffix
    ) -> tuple[Float[Tensor, "B S D"], Float[Tensor, "B H E"]]:
        """Both experts over the whole sequence, as in training: their outputs."""
        mask, positions = self.attention(prefix)
        return self.gemma(
            prefix.tokens,
            suffix.tokens,
            suffix.condition,
            mask,
            positions,
            self.gradient_checkpointing,
            self.compiled_training,
        )

    def prefill(self, prefix: Prefix) -> KVCache:
        """Keys and values of the prefix, for the denoising steps."""
        mask, positions = self.attention(prefix)
        length = prefix.tokens.shape[1]
        _, cache = self.gemma.prefill(
            prefix.tokens, mask[:, :length, :length], positions[:, :length]
        )
        return cache

    def velocity(
        self,
        prefix: Prefix,
        cache: KVCache,
        state: Float[Tensor, "B A"],
        noisy_actions: Float[Tensor, "B H A"],
        embedding: Float[Tensor, "E"],
    ) -> Float[Tensor, "B H A"]:
        """One denoising step's velocity, from the cached prefix, at an embedded time."""
        repeated = embedding.expand(state.shape[0], -1)
        suffix = self.embed_suffix_at(state, noisy_actions, repeated)
        mask, positions = self.attention(prefix)
        length = prefix.tokens.shape[1]
        output = self.gemma.decode(
            suffix.tokens, suffix.condition, mask[:, length:], positions[:, length:], cache
        )
        return self._velocity(output)

    def sample_actions(
        self,
        observation: Observation,
        noise: Float[Tensor, "B H A"],
        num_steps: int = 10,
    ) -> Float[Tensor, "B H A"]:
        """Actions, denoised from the noise by Euler steps. See `sampling.sample_actions`."""
        return sampling.sample_actions(self, observation, noise, num_steps)

    def prepare(self, observation: Observation) -> Observation:
        """The observation as tensors on the model's device, checked against the config; images of
        uint8 are scaled there."""
        observation.check(self.config)

        def move(array: Any) -> Tensor:
            tensor = torch.as_tensor(array, device=self.device)
            is_number = tensor.is_floating_point() or tensor.dtype == torch.uint8
            return as_float(tensor, wide(self.dtype)) if is_number else tensor

        return observation.map(move, checked=False)

    @property
    def device(self) -> torch.device:
        return self.action_out_proj.kernel.device

    def _as_wide(self, array: Any) -> Tensor:
        return torch.as_tensor(array, device=self.device).to(wide(self.dtype))

    def _velocity(self, output: Float[Tensor, "B H E"]) -> Float[Tensor, "B H A"]:
        return self.action_out_proj(output[:, -self.config.action_horizon :].to(wide(self.dtype)))


def _each(mask: Bool[Tensor, "B C"], times: int) -> Bool[Tensor, "B C*N"]:
    """Every entry so many times in a row; `repeat_interleave` asks for more launches."""
    return mask[:, :, None].expand(-1, -1, times).flatten(1)
