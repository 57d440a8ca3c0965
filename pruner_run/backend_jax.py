"""`pruner_jax` as the application sees it."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pruner_jax import checkpoint, sampling, sharding
from pruner_jax.pi0 import Pi0
from pruner_jax.training import Trainer
from pruner_run.backend import Pruned, Weights, clocked
from pruner_spec.config import Pi0Config
from pruner_spec.observation import Observation
from pruner_spec.training import TrainingSettings

_ADDRESS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


class JaxBackend:
    """JAX, on its default device."""

    name = "jax"
    title = "JAX"

    @property
    def device(self) -> str:
        return jax.default_backend()

    def model(self, config: Pi0Config, weights: Weights) -> "JaxModel":
        return JaxModel(checkpoint.load(weights, config))

    def devices(self, fsdp_devices: int = 1) -> "JaxDevices":
        return JaxDevices(fsdp_devices)


class JaxDevices:
    """All devices of this process, and of those that were started with it."""

    def __init__(self, fsdp_devices: int) -> None:
        _join()
        self.process, self.processes = jax.process_index(), jax.process_count()
        self.count = jax.device_count()
        is_one = self.count == fsdp_devices == 1
        self._mesh = None if is_one else sharding.make_mesh(fsdp_devices)

    def trainer(
        self,
        config: Pi0Config,
        settings: TrainingSettings,
        weights: Weights | None,
        compiled: bool | None = None,
    ) -> Trainer:
        if config.dtype == "float64":  # in the whole process, which is the run's
            jax.config.update("jax_enable_x64", True)
        return Trainer(config, settings, weights, mesh=self._mesh)

    def largest(self, number: int) -> Any:
        return number if self._mesh is None else sharding.largest(number, self._mesh)

    def close(self) -> None:
        if self.processes > 1:
            jax.distributed.shutdown()


def _join() -> None:
    """Meets the other processes of a run; before JAX looks for devices.

    Of Slurm and Open MPI it knows itself how many there are; elsewhere the environment says so.
    """
    given = {name: os.environ[name] for name in _ADDRESS if name in os.environ}
    if len(given) == len(_ADDRESS):
        address, count, number = given.values()
        jax.distributed.initialize(address, int(count), int(number))
    elif given:
        raise ValueError(f"expected all or none of {', '.join(_ADDRESS)} to be set, got {given}")
    elif any(int(os.environ.get(name, "1")) > 1 for name in _TASKS):
        jax.distributed.initialize()


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

    def kept(self) -> dict[str, np.ndarray]:
        cameras, encoded, selection = self._model.record.last
        kept = np.asarray(selection.kept).reshape(encoded.patches.shape[:3])
        return dict(zip(cameras, kept.swapaxes(0, 1), strict=True))

    def stages(
        self, observation: Observation, noise: np.ndarray, num_steps: int
    ) -> dict[str, float]:
        graph, weights = nnx.split(self._model)
        plan = sampling.plan_of(observation)
        observation = self._model.prepare(observation)
        noise_there = jnp.asarray(noise, observation.state.dtype)

        @jax.jit
        def encode(weights: Any, observation: Observation) -> Any:
            model = nnx.merge(graph, weights)
            encoded = model.encode(observation, plan.cameras, plan.prompt_length)
            return encoded, model.select(encoded)

        finish = jax.block_until_ready
        (encoded, selection), vision = clocked(lambda: encode(weights, observation), finish)
        room = sampling.capacity(self._model, encoded, selection)

        @jax.jit
        def prefill(weights: Any, encoded: Any, selection: Any) -> Any:
            model = nnx.merge(graph, weights)
            prefix = sampling.prune(model, encoded, selection, room)
            return prefix, model.prefill(prefix)

        @jax.jit
        def denoise(weights: Any, prefix: Any, cache: Any, state: Any, noise: Any) -> jax.Array:
            model = nnx.merge(graph, weights)
            return sampling.denoise(model, prefix, cache, state, noise, num_steps)

        (prefix, cache), reading = clocked(lambda: prefill(weights, encoded, selection), finish)
        inputs = (weights, prefix, cache, observation.state, noise_there)
        _, denoising = clocked(lambda: denoise(*inputs), finish)
        return {"vision": vision, "prefix": reading, "denoising": denoising}

    def stats(self) -> dict[str, Any]:
        return self._model.get_token_pruning_stats()


create = JaxBackend
