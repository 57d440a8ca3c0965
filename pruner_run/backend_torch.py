"""`pruner_torch` as the application sees it."""

from typing import Any

import numpy as np
import torch

from pruner_run.backend import Pruned, Weights
from pruner_spec.config import Pi0Config
from pruner_spec.observation import Observation
from pruner_spec.training import TrainingSettings
from pruner_torch import checkpoint
from pruner_torch.pi0 import Pi0
from pruner_torch.training import Trainer


class TorchBackend:
    """PyTorch, on a GPU where there is one."""

    name = "torch"
    title = "PyTorch"

    def __init__(self) -> None:
        self.device = "cuda" if torch.cuda.is_available() else torch.get_default_device().type

    def model(self, config: Pi0Config, weights: Weights) -> "TorchModel":
        return TorchModel(checkpoint.load(weights, config, device=self.device))

    def trainer(
        self, config: Pi0Config, settings: TrainingSettings, weights: Weights | None
    ) -> Trainer:
        return Trainer(config, settings, weights, device=self.device)


class TorchModel:
    """A `Pi0`, NumPy in and out."""

    def __init__(self, model: Pi0) -> None:
        self._model = model

    def sample_actions(
        self, observation: Observation, noise: np.ndarray, num_steps: int
    ) -> np.ndarray:
        noise_there = torch.as_tensor(noise, device=self._model.device)
        actions = self._model.sample_actions(observation, noise_there, num_steps)
        return actions.cpu().numpy()

    def loss(
        self, observation: Observation, actions: np.ndarray, noise: np.ndarray, time: np.ndarray
    ) -> np.ndarray:
        device = self._model.device
        arrays = (torch.as_tensor(array, device=device) for array in (actions, noise, time))
        with torch.no_grad():
            return self._model.compute_loss(observation, *arrays, train=False).cpu().numpy()

    def pruned(self) -> Pruned:
        _, encoded, selection = self._model.record.last
        return Pruned(
            patches=encoded.patches.cpu().numpy(),
            prompt=encoded.prompt.cpu().numpy(),
            prompt_mask=encoded.prompt_mask.cpu().numpy(),
            kept=selection.kept.cpu().numpy().reshape(encoded.patches.shape[:3]),
        )

    def stats(self) -> dict[str, Any]:
        return self._model.get_token_pruning_stats()


create = TorchBackend
