"""`pruner_jax` as the application sees it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pruner_jax import checkpoint
from pruner_jax.pi0 import Pi0
from pruner_jax.training import Trainer
from pruner_run.backend import Pruned, Weights
from pruner_spec.config import Pi0Config
from pruner_spec.observation import Observation
from pruner_spec.training import TrainingSettings


class JaxBackend:
    """JAX, on its default device."""

    name = "jax"
    title = "JAX"

    def __init__(self) -> None:
        self.device = jax.default_backend()

    def model(self, config: Pi0Config, weights: Weights) -> "JaxModel":
        return JaxModel(checkpoint.load(weights, config))

    def trainer(
        self, config: Pi0Config, settings: TrainingSettings, weights: Weights | None
    ) -> Trainer:
        return Trainer(config, settings, weights)


class JaxModel:
    """A `Pi0`, NumPy in and out."""

    def __init__(self, model: Pi0) -> None:
        self._model = model

    def sample_actions(
        self, observation: Observation, noise: np.ndarray, num_steps: int
    ) -> np.ndarray:
        return np.asarray(self._model.sample_actions(observation, jnp.asarray(noise), num_steps))

    def loss(
        self, observation: Observation, actions: np.ndarray, noise: np.ndarray, time: np.ndarray
    ) -> np.ndarray:
        graph, weights = nnx.split(self._model)

        @jax.jit
        def loss(weights: Any, *arrays: Any) -> jax.Array:
            return nnx.merge(graph, weights).compute_loss(*arrays, train=False)

        return np.asarray(loss(weights, observation, actions, noise, time))

    def pruned(self) -> Pruned:
        _, encoded, selection = self._model.record.last
        return Pruned(
            patches=np.asarray(encoded.patches),
            prompt=np.asarray(encoded.prompt),
            prompt_mask=np.asarray(encoded.prompt_mask),
            kept=np.asarray(selection.kept).reshape(encoded.patches.shape[:3]),
        )

    def stats(self) -> dict[str, Any]:
        return self._model.get_token_pruning_stats()


create = JaxBackend
