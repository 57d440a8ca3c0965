"""`pruner_torch` as the application sees it."""

import datetime
import os
from typing import Any

import numpy as np
import torch
from torch import distributed

from pruner_run.backend import Pruned, Weights, clocked
from pruner_spec.config import Pi0Config
from pruner_spec.observation import Observation
from pruner_spec.training import TrainingSettings
from pruner_torch import checkpoint, sampling, sharding
from pruner_torch.layers import wide
from pruner_torch.pi0 import Pi0
from pruner_torch.training import Trainer

# The first process writes a checkpoint while the others wait for its next step.
_PATIENCE = datetime.timedelta(minutes=30)


class TorchBackend:
    """PyTorch, on a GPU where there is one."""

    name = "torch"
    title = "PyTorch"

    def __init__(self) -> None:
        self.device = "cuda" if torch.cuda.is_available() else torch.get_default_device().type

    def model(self, config: Pi0Config, weights: Weights) -> "TorchModel":
        return TorchModel(checkpoint.load(weights, config, device=self.device))

    def devices(self, fsdp_devices: int = 1) -> "TorchDevices":
        return TorchDevices(fsdp_devices)


class TorchDevices:
    """A device a process: all those that torchrun started, or this one alone."""

    def __init__(self, fsdp_devices: int) -> None:
        self._mesh, kind = None, "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")))
        if "WORLD_SIZE" not in os.environ:
            _check_alone(fsdp_devices)
            self.process, self.processes, self.count = 0, 1, 1
            return
        if kind == "cuda":
            if self._device.index >= (found := torch.cuda.device_count()):
                raise ValueError(
                    f"nproc_per_node: expected at most the {found} GPUs of this machine, got more"
                )
            torch.cuda.set_device(self._device)
        distributed.init_process_group(
            timeout=_PATIENCE, device_id=self._device if kind == "cuda" else None
        )
        self._mesh = sharding.make_mesh(fsdp_devices, device=kind)
        self.process = distributed.get_rank()
        self.processes = self.count = distributed.get_world_size()

    def trainer(
        self,
        config: Pi0Config,
        settings: TrainingSettings,
        weights: Weights | None,
        compiled: bool | None = None,
    ) -> Trainer:
        return Trainer(
            config, settings, weights, mesh=self._mesh, device=self._device, compiled=compiled
        )

    def largest(self, number: int) -> Any:
        return number if self._mesh is None else sharding.largest(number, self._mesh)

    def close(self) -> None:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _check_alone(fsdp_devices: int) -> None:
    """Raises a ValueError where several processes are wanted, and nobody introduced them."""
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if fsdp_devices != 1 or tasks != 1:
        raise ValueError(
            f"fsdp_devices: expected 1 in one process, got {fsdp_devices} in {tasks}; start a "
            "process a device: torchrun --standalone --nproc_per_node=8 -m pruner_run.train ..."
        )


def _numpy(tokens: torch.Tensor) -> np.ndarray:
    """The same numbers on the host, where NumPy has no bfloat16."""
    return tokens.to(wide(tokens.dtype)).cpu().numpy()


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
            patches=_numpy(encoded.patches),
            prompt=_numpy(encoded.prompt),
            prompt_mask=encoded.prompt_mask.cpu().numpy(),
            kept=selection.kept.cpu().numpy().reshape(encoded.patches.shape[:3]),
        )

    def kept(self) -> dict[str, np.ndarray]:
        cameras, encoded, selection = self._model.record.last
        kept = selection.kept.cpu().numpy().reshape(encoded.patches.shape[:3])
        return dict(zip(cameras, kept.swapaxes(0, 1), strict=True))

    @torch.no_grad()
    def stages(
        self, observation: Observation, noise: np.ndarray, num_steps: int
    ) -> dict[str, float]:
        model = self._model
        plan = sampling.plan_of(observation)
        observation = model.prepare(observation)
        noise_there = torch.as_tensor(noise, device=model.device).to(observation.state.dtype)

        def finish(result: Any) -> Any:
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            return result

        def encode() -> Any:
            encoded = model.encode(observation, plan.cameras, plan.prompt_length)
            return encoded, model.select(encoded)

        (encoded, selection), vision = clocked(encode, finish)
        room = sampling.capacity(model, encoded, selection)

        def prefill() -> Any:
            prefix = sampling.prune(model, encoded, selection, room)
            return prefix, model.prefill(prefix)

        (prefix, cache), reading = clocked(prefill, finish)

        def denoise() -> torch.Tensor:
            state = observation.state
            return sampling.denoise(model, prefix, cache, state, noise_there, num_steps)

        _, denoising = clocked(denoise, finish)
        return {"vision": vision, "prefix": reading, "denoising": denoising}

    def stats(self) -> dict[str, Any]:
        return self._model.get_token_pruning_stats()


create = TorchBackend
