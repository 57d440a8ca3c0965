"""`pruner_torch` as the application sees it."""

import dataclasses
import datetime
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import distributed

from pruner_run.backend import Pruned, Weights, stage_times
from pruner_spec.config import Pi0Config
from pruner_spec.inference import InferenceSettings
from pruner_spec.observation import Observation
from pruner_spec.parameters import parameter_dtype, parameter_table, random_scale
from pruner_spec.training import TrainingSettings
from pruner_torch import checkpoint, sampling, sharding
from pruner_torch.inference import Sampler, tried
from pruner_torch.layers import wide
from pruner_torch.pi0 import Pi0
from pruner_torch.pruner import Selection
from pruner_torch.training import Trainer

# The first process writes a checkpoint while the others wait for its next step.
_PATIENCE = datetime.timedelta(minutes=30)


class TorchBackend:
    """PyTorch, on a GPU where there is one."""

    name = "torch"
    title = "PyTorch"

    def __init__(self) -> None:
        self.device = "cuda" if torch.cuda.is_available() else torch.get_default_device().type

    def model(
        self,
        config: Pi0Config,
        weights: Weights | None,
        *,
        fast: bool | None = False,
        settings: InferenceSettings | None = None,
    ) -> "TorchModel":
        if weights is None:
            model = _random_model(config, self.device)
        else:
            model = checkpoint.load(weights, config, device=self.device)
        return TorchModel(model, fast=fast, settings=settings)

    def devices(self, fsdp_devices: int = 1) -> "TorchDevices":
        return TorchDevices(fsdp_devices)


def _random_model(config: Pi0Config, device: str) -> Pi0:
    """Drawn on the device, where 3 billion numbers take no time."""
    generator = torch.Generator(device).manual_seed(0)
    state = {}
    for family in parameter_table(config).values():
        dtype = getattr(torch, parameter_dtype(family.name, config.dtype))
        mean, deviation = random_scale(family)
        for name in family.torch_names:
            array = torch.empty(family.shape, dtype=dtype, device=device)
            state[name] = array.normal_(mean, deviation, generator=generator)
    model = Pi0(config, seed=None)
    model.load_state_dict(state, assign=True)
    return model


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

    def __init__(
        self, model: Pi0, *, fast: bool | None = False, settings: InferenceSettings | None = None
    ) -> None:
        self._model, self._settings = model, settings
        self._is_to_try = fast is None and model.device.type == "cuda"
        self._stages: sampling.Stages = (
            Sampler(model, settings) if fast else sampling.PlainStages(model)
        )

    def sample_actions(
        self, observation: Observation, noise: np.ndarray, num_steps: int
    ) -> np.ndarray:
        noise_there = torch.as_tensor(noise, device=self._model.device)
        return self._sample(observation, noise_there, num_steps).cpu().numpy()

    def warm_up(self, observation: Observation, noise: np.ndarray, num_steps: int) -> None:
        self.sample_actions(observation, noise, num_steps)
        if isinstance(self._stages, Sampler):
            self._stages.warm_up(observation, torch.as_tensor(noise), num_steps)

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

    def prepared(
        self, observation: Observation, noise: np.ndarray, num_steps: int
    ) -> Callable[[], torch.Tensor]:
        there, noise_there = self._on_device(observation, noise)
        # The host looks at masks before anything else; on the device it would have to wait.
        there = dataclasses.replace(
            there,
            image_masks=observation.image_masks,
            tokenized_prompt_mask=observation.tokenized_prompt_mask,
        )

        def call() -> torch.Tensor:
            return self._finish(self._sample(there, noise_there, num_steps))

        return call

    def prefix_length(self, observation: Observation) -> int:
        plan, model = sampling.plan_of(observation), self._model
        patches = len(plan.cameras) * model.config.vision.num_patches
        if model.config.prunes_at_inference:
            _, encoded, selection = model.record.last
            patches = sampling.capacity(model, encoded, selection) or patches
        return patches + plan.prompt_length

    @torch.no_grad()
    def stages(
        self, observation: Observation, noise: np.ndarray, num_steps: int
    ) -> dict[str, float]:
        there, noise_there = self._on_device(observation, noise)
        return stage_times(
            self._stages,
            there,
            sampling.plan_of(observation),
            noise_there,
            num_steps,
            capacity=functools.partial(sampling.capacity, self._model),
            finish=self._finish,
        )

    def sample_kept(
        self,
        observation: Observation,
        noise: np.ndarray,
        num_steps: int,
        kept: Mapping[str, np.ndarray],
    ) -> np.ndarray:
        model, chosen = self._model, np.concatenate(list(kept.values()), axis=1)
        stages = _ChosenStages(model, torch.as_tensor(chosen, device=model.device))
        there = torch.as_tensor(noise, device=model.device)
        actions = self._sample(observation, there, num_steps, stages)
        cameras, encoded, _ = model.record.last
        model.record.last = (cameras, encoded, stages.own)
        return actions.cpu().numpy()

    def widened(self) -> "TorchModel":
        config = dataclasses.replace(self._model.config, dtype="float32")
        with torch.device("meta"):
            model = Pi0(config, seed=None)
        for name, parameter in self._model.named_parameters():
            model.load_state_dict({name: parameter.data.float()}, strict=False, assign=True)
            parameter.data = parameter.data.new_empty(0)  # never all of both at once
        return _WideModel(model)

    def _sample(
        self,
        observation: Observation,
        noise: torch.Tensor,
        num_steps: int,
        stages: sampling.Stages | None = None,
    ) -> torch.Tensor:
        if self._is_to_try:
            self._is_to_try = False
            self._stages = tried(self._model, observation, noise, num_steps, self._settings)
        stages = self._stages if stages is None else stages
        return sampling.sample_actions(self._model, observation, noise, num_steps, stages)

    def _on_device(
        self, observation: Observation, noise: np.ndarray
    ) -> tuple[Observation, torch.Tensor]:
        """As they are, so that bytes are not scaled before a call begins; state and noise in the
        dtype in which `sampling.Stages` takes them."""
        device, dtype = self._model.device, wide(self._model.dtype)
        there = observation.map(lambda array: torch.as_tensor(array, device=device))
        there = dataclasses.replace(there, state=there.state.to(dtype))
        return there, torch.as_tensor(noise, device=device).to(dtype)

    def _finish(self, result: Any) -> Any:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        return result

    def stats(self) -> dict[str, Any]:
        return self._model.get_token_pruning_stats()


class _WideModel(TorchModel):
    """A float32 model as a reference, whatever else computes float32 products in TF32."""

    def _sample(self, *arguments: Any) -> torch.Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            return super()._sample(*arguments)
        finally:
            torch.set_float32_matmul_precision(before)


class _ChosenStages(sampling.PlainStages):
    """The plain way, with patches that were chosen elsewhere; `own` are those it would keep."""

    def __init__(self, model: Pi0, kept: torch.Tensor) -> None:
        super().__init__(model)
        self._kept = kept
        self.own: Selection | None = None

    def select(self, encoded: Any) -> Selection:
        self.own = super().select(encoded)
        return Selection.of(self._kept, self.own.nonfinite)


create = TorchBackend
