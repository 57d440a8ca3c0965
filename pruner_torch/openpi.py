"""`PI0Pytorch` with openpi's calling conventions: openpi users change an import.

Only here is randomness drawn inside, as openpi does. openpi's model augments images in `forward`,
always; this one leaves images as they are.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pruner_spec.config import CAMERAS, Pi0Config
from pruner_spec.observation import Observation
from pruner_torch.pi0 import Encoded, Pi0, Prefix


class PI0Pytorch(Pi0):
    """π0 or π0.5 as openpi's PyTorch trainer and policy call it.

    `train()` selects patches softly, with gradients; `eval()` drops the others.

    Args:
        config: any object with openpi's field names; missing ones get their defaults.
        seed: of the initial weights; None leaves them uninitialised.
        device: where the parameters are; None for PyTorch's default.

    Attributes:
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
        super().__init__(Pi0Config.from_fields(config), seed=seed, device=device)
        self.last_kept_per_sample: Int[Tensor, "B"] | None = None

    def forward(
        self,
        observation: Any,
        actions: Float[Tensor, "B H A"],
        noise: Float[Tensor, "B H A"] | None = None,
        time: Float[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B H"]:
        """The loss, [B, H] as in JAX; openpi's PyTorch model leaves the last axis to the caller."""
        observation = as_observation(observation)
        noise = self.sample_noise(actions.shape) if noise is None else noise
        time = self.sample_time(actions.shape[0]) if time is None else time
        pruner_noise = self._draw_pruner_noise(actions.shape[0], len(CAMERAS))
        return self.compute_loss(observation, actions, noise, time, pruner_noise, self.training)

    def embed_prefix(  # type: ignore[override]
        self,
        images: Observation | Sequence[Float[Tensor, "B 3 224 224"]],
        img_masks: Sequence[Bool[Tensor, "B"]] | Any = None,
        lang_tokens: Int[Tensor, "B L"] | Any = False,
        lang_masks: Bool[Tensor, "B L"] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor] | Prefix:
        """Embeddings [B, S, D], padding masks [B, S] and attention masks [B, S] of the prefix.

        Called with an `Observation`, it is `Pi0.embed_prefix`.
        """
        if isinstance(images, Observation):
            return super().embed_prefix(images, img_masks, lang_tokens)
        prefix = self._prefix(self._encode(images, img_masks, lang_tokens, lang_masks))
        return prefix.tokens, prefix.valid, torch.zeros_like(prefix.valid)

    def sample_actions(  # type: ignore[override]
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
        return super().sample_actions(observation, noise, num_steps)
