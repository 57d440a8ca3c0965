"""`PI0Pytorch` with openpi's calling conventions: openpi users change an import.

Only here is randomness drawn inside, as openpi does. openpi's model augments images in `forward`,
always; this one leaves images as they are.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pruner_spec.config import CAMERAS, Pi0Config
from pruner_spec.inference import InferenceSettings
from pruner_spec.observation import Observation
from pruner_spec.parameters import parameter_table
from pruner_torch import checkpoint, inference, kernels_plain, sampling
from pruner_torch.layers import wide
from pruner_torch.pi0 import Encoded, Pi0, Prefix


class PI0Pytorch(nn.Module):
    """π0 or π0.5 as openpi's PyTorch trainer and policy call it.

    `train()` selects patches softly, with gradients; `eval()` drops the others. openpi's tensor
    names are accepted by `load_state_dict`, and so by `safetensors.torch.load_model`.

    In `eval()` actions are sampled the fast way (`inference.Sampler`), on a GPU by default. Two
    environment variables of openpi's users say otherwise: OPENPI_TORCH_COMPILE=0 for layer by
    layer, 1 for `torch.compile`; with pruning that is left to OPENPI_TORCH_COMPILE_PRUNING, if set.

    Args:
        config: any object with openpi's field names; missing ones get their defaults.
        seed: of the initial weights; None leaves them without memory, for `load_state_dict` with
            `assign=True`.
        device: where the parameters are; None for PyTorch's default.

    Attributes:
        pi0: the model.
        last_kept_per_sample: patches kept in the last `embed_prefix`, int [B]; None after a soft
            selection, or without pruning.
    """

    def __init__(
        self,
        config: Any,
        *,
        seed: int | None = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.pi0 = Pi0(Pi0Config.from_fields(config), seed=seed, device=device)
        self.last_kept_per_sample: Tensor | None = None
        self._deployed: tuple[Any, sampling.Stages] | None = None  # from what, and what
        self.register_load_state_dict_pre_hook(_rename_from_openpi)

    @property
    def config(self) -> Pi0Config:
        return self.pi0.config

    @property
    def token_pruning_enabled(self) -> bool:
        return self.pi0.token_pruning_enabled

    def set_token_pruner_noise_scale(self, noise_scale: float | None) -> None:
        """Overrides the config's noise scale; None goes back to it."""
        self.pi0.set_token_pruner_noise_scale(noise_scale)

    def get_token_pruning_stats(self) -> dict[str, Any]:
        """How the last sampled batch was pruned. See `sampling.stats`."""
        return self.pi0.get_token_pruning_stats()

    def gradient_checkpointing_enable(self) -> None:
        """Layers are recomputed in the backward pass."""
        self.pi0.gradient_checkpointing = "full"

    def gradient_checkpointing_disable(self) -> None:
        """Layers keep what the backward pass needs."""
        self.pi0.gradient_checkpointing = "none"

    def sample_noise(
        self, shape: Sequence[int], device: torch.device | str
    ) -> Float[Tensor, "..."]:
        """Standard normal noise."""
        return torch.randn(*shape, device=device, dtype=wide(self.pi0.dtype))

    def sample_time(self, bsize: int, device: torch.device | str) -> Float[Tensor, "bsize"]:
        """Flow matching times: Beta(1.5, 1) · 0.999 + 0.001."""
        uniform = torch.rand(bsize, device=device, dtype=wide(self.pi0.dtype))
        return uniform ** (1 / 1.5) * 0.999 + 0.001

    def forward(
        self,
        observation: Any,
        actions: Float[Tensor, "B H A"],
        noise: Float[Tensor, "B H A"] | None = None,
        time: Float[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B H"]:
        """The loss, [B, H] as in JAX; openpi's PyTorch model leaves the mean over A to the caller.

        Args:
            observation: an object with openpi's attributes; images channels first or last.
            actions: normalised, zero-padded to A.
            noise: None to draw it.
            time: None to draw it.
        """
        batch, device = actions.shape[0], self.pi0.device
        noise = self.sample_noise(actions.shape, device) if noise is None else noise
        time = self.sample_time(batch, device) if time is None else time
        pruner_noise = self._draw_pruner_noise(batch, len(CAMERAS))
        return self.pi0.compute_loss(
            as_observation(observation), actions, noise, time, pruner_noise, self.training
        )

    def embed_prefix(
        self,
        images: Sequence[Float[Tensor, "B 3 224 224"]],
        img_masks: Sequence[Bool[Tensor, "B"]],
        lang_tokens: Int[Tensor, "B L"],
        lang_masks: Bool[Tensor, "B L"],
    ) -> tuple[Float[Tensor, "B S D"], Bool[Tensor, "B S"], Bool[Tensor, "B S"]]:
        """Embeddings, padding masks and attention masks of the prefix, any number of cameras."""
        encoded = self.pi0.embed(
            torch.stack([channels_last(image) for image in images], dim=1),
            torch.stack(list(img_masks), dim=1),
            lang_tokens,
            lang_masks,
        )
        prefix = self._prefix(encoded)
        return prefix.tokens, prefix.valid, torch.zeros_like(prefix.valid)

    def sample_actions(
        self,
        device: torch.device | str,
        observation: Any,
        noise: Float[Tensor, "B H A"] | None = None,
        num_steps: int = 10,
    ) -> Float[Tensor, "B H A"]:
        """Actions for openpi's observation, with hard selection whatever the mode."""
        observation = as_observation(observation)
        if noise is None:
            shape = (observation.batch_size, self.config.action_horizon, self.config.action_dim)
            noise = self.sample_noise(shape, device)
        stages = None if self.training else self._stages(observation, noise, num_steps)
        return sampling.sample_actions(self.pi0, observation, noise, num_steps, stages)

    def _stages(
        self, observation: Observation, noise: Float[Tensor, "B H A"], num_steps: int
    ) -> sampling.Stages | None:
        """The fast way over the parameters as they are now; None for layer by layer."""
        settings = _inference_settings(self.token_pruning_enabled, self.pi0.device)
        if settings is None or torch.compiler.is_compiling():
            return None
        made_from = (self.pi0, settings, _state_of(self.pi0))
        if self._deployed is None or self._deployed[0] != made_from:
            self._deployed = None  # frees what it holds before the next one is made
            stages = inference.tried(self.pi0, observation, noise, num_steps, settings)
            self._deployed = (made_from, stages)
        return self._deployed[1]

    def _prefix(self, encoded: Encoded) -> Prefix:
        self.last_kept_per_sample = None
        if not self.token_pruning_enabled:
            return self.pi0.assemble(encoded)
        if self.training:
            noise = self._draw_pruner_noise(*encoded.camera_mask.shape)
            return self.pi0.assemble(encoded, self.pi0.relax(encoded, noise))
        selection = self.pi0.select(encoded, kernels_plain)
        self.last_kept_per_sample = selection.kept.sum(dim=-1)
        capacity = sampling.capacity(self.pi0, encoded, selection)
        return sampling.prune(self.pi0, encoded, selection, capacity, kernels_plain)

    def _draw_pruner_noise(self, batch: int, cameras: int) -> Float[Tensor, "*pools N N"] | None:
        scale = self.pi0.token_pruner_noise_scale
        if not (self.training and self.token_pruning_enabled and scale > 0):
            return None
        patches = self.config.vision.num_patches
        shape = (batch, cameras, patches, patches)
        if self.config.token_prune_scope == "joint":
            shape = (batch, cameras * patches, cameras * patches)
        return torch.rand(shape, device=self.pi0.device, dtype=wide(self.pi0.dtype)) * scale


def _state_of(model: Pi0) -> list[tuple[int, int]]:
    """Where each parameter is, and how often it was written to."""
    return [(parameter.data_ptr(), parameter._version) for parameter in model.parameters()]


def _inference_settings(is_pruning: bool, device: torch.device) -> InferenceSettings | None:
    """What the environment asks for; None for layer by layer."""
    wanted, with_pruning = map(_switch, ("OPENPI_TORCH_COMPILE", "OPENPI_TORCH_COMPILE_PRUNING"))
    if is_pruning and wanted is not False and with_pruning is not None:
        wanted = with_pruning or None
    if wanted is None:
        return InferenceSettings() if device.type == "cuda" else None
    return InferenceSettings(compiled=True) if wanted else None


def _switch(name: str) -> bool | None:
    """An environment variable that is on or off; None where it is not set.

    Raises:
        ValueError: it is neither.
    """
    value = os.environ.get(name, "").strip().lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("0", "false", "no", "off"):
        return False
    if value:
        raise ValueError(f"{name}: expected 0 or 1, got {value!r}")
    return None


def as_observation(observation: Any) -> Observation:
    """The spec's observation from any object with openpi's attributes.

    Raises:
        ValueError: an array does not fit.
    """
    if isinstance(observation, Observation):
        return observation
    fields = {
        field.name: getattr(observation, field.name) for field in dataclasses.fields(Observation)
    }
    fields["images"] = {name: channels_last(image) for name, image in fields["images"].items()}
    return Observation(**fields)


def channels_last(image: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B height width 3"]:
    """The image with its channels last, wherever they were."""
    return image.permute(0, 2, 3, 1) if image.shape[1] == 3 else image


def _rename_from_openpi(
    module: PI0Pytorch, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Puts our names in the place of openpi's, in a state dict about to be loaded."""
    theirs = {name.removeprefix(prefix): value for name, value in state_dict.items()}
    if not any(name.startswith("paligemma_with_expert.") for name in theirs):
        return
    table = parameter_table(module.config)
    state_dict.clear()
    for name, value in checkpoint.read(theirs, module.config):
        for torch_name, layer in checkpoint.unstacked(value, table[name]).items():
            state_dict[f"{prefix}pi0.{torch_name}"] = layer
