"""The training step, as `pruner_spec.training` and `pruner_spec.optimization` define it.

Parameters and moments are float32 (float64 in a float64 model), whatever the model computes in. The
host never waits for the device in a step: what changes with the step, its number, the learning rate
and the noise's scale, is known to the host, and nothing is read back.

Over several processes each has a trainer, calls it when the others do, and gives it its own share
of the batch; see `sharding`.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from pruner_spec.config import CAMERAS, Pi0Config
from pruner_spec.parameters import completed, initial_parameters, parameter_table
from pruner_spec.stats import PrunerRecord
from pruner_spec.training import (
    Batch,
    TrainingSettings,
    TrainState,
    check_divisible,
    master_dtype,
    trained_names,
)
from pruner_torch import checkpoint, sharding
from pruner_torch.metrics import Measures, Pruning, summarize
from pruner_torch.objective import draw, to_device
from pruner_torch.pi0 import Pi0


class Trainer:
    """A run's state, and its steps.

    Args:
        config: the model's; it computes in `config.dtype`.
        settings: the run's.
        weights: to begin with, anything that `checkpoint.load` takes; None for
            `initial_parameters` by the settings' seed.
        mesh: of `sharding.make_mesh`, to train over several processes.
        device: where everything is; None for PyTorch's default.
        compiled: whether layers are compiled, which takes half a minute and rounds otherwise; None
            for where it pays, on a GPU. Layers that are split over devices are not.

    Raises:
        ValueError: nothing is to be trained; or as `checkpoint.load`.
    """

    def __init__(
        self,
        config: Pi0Config,
        settings: TrainingSettings,
        weights: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        *,
        mesh: DeviceMesh | None = None,
        device: torch.device | str | None = None,
        compiled: bool | None = None,
    ) -> None:
        self.config = config
        self.settings = settings
        self._names = trained_names(config, settings)
        self._device = torch.get_default_device() if device is None else torch.device(device)
        self._record = PrunerRecord()
        self._step = 0
        self._mesh = mesh
        self._model = _empty(config, settings, self._names, mesh).to_empty(device=self._device)
        compiled = self._device.type == "cuda" if compiled is None else compiled
        self._model.compiled_training = compiled and not sharding.is_split(mesh)
        parameters = dict(self._model.named_parameters())
        self._assign(parameters, _named(config, settings, weights))
        self._trained = {name: p for name, p in parameters.items() if p.requires_grad}
        self._objective = sharding.Objective(self._model)
        if mesh is not None and not sharding.is_split(mesh):
            self._objective = sharding.repeated(self._model, mesh)
        self._average = None
        if settings.ema_decay is not None:
            self._average = {name: p.detach().clone() for name, p in self._trained.items()}
        self._optimizer = _adamw(list(self._trained.values()), settings)

    @property
    def step_count(self) -> int:
        """How many steps were made; the next step's number."""
        return self._step

    def set_token_pruner_noise_scale(self, noise_scale: float | None) -> None:
        """Overrides the settings' noise schedule; None goes back to it."""
        self._record.set_noise_scale(noise_scale)

    def step(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """Makes a step, and gives its metrics; nobody waits for the device here.

        Args:
            batch: of NumPy arrays or tensors.

        Raises:
            ValueError: `accumulation` does not divide the batch, or an array does not fit.
        """
        check_divisible(batch, self.settings.accumulation)
        metrics = self._summarized([self._backward(part) for part in self._parts(batch)])
        metrics |= self._update()
        self._step += 1
        return metrics

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """The metrics that the next step would have on a batch, without a step and its norms."""
        check_divisible(batch, self.settings.accumulation)
        return self._summarized([self._measures(part) for part in self._parts(batch)])

    def state(self, *, everywhere: bool = True) -> TrainState | None:
        """All that is needed to go on, in this backend or the other; a copy.

        Args:
            everywhere: in all processes, which all must ask for it; or else in the first alone,
                and None in the others. Weights that no other device has a part of are then no
                copy, but read as they are taken, which has to be before the next step.
        """
        keeps = everywhere or self._mesh is None or self._mesh.get_rank() == 0
        parameters, average = dict(self._model.named_parameters()), self._average
        copies = everywhere or sharding.is_split(self._mesh)
        stack = checkpoint.stacked if copies else checkpoint.lazily_stacked

        def stacked(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
            return self._stacked(tensors, stack if keeps else None)

        state = TrainState(
            step=self._step,
            parameters=stacked(parameters),
            average=None if average is None else stacked(parameters | average),
            first=stacked(self._moments("exp_avg")),
            second=stacked(self._moments("exp_avg_sq")),
        )
        return state if keeps else None

    def restore(self, state: TrainState) -> None:
        """Goes on from a state, of this backend or the other.

        Raises:
            ValueError: it is not of a run with this model and these settings.
        """
        state.check(self.config, self.settings)
        self._assign(dict(self._model.named_parameters()), state.parameters.items())
        if self._average is not None and state.average is not None:
            self._assign(self._average, state.average.items())
        self._assign(self._moments("exp_avg"), state.first.items())
        self._assign(self._moments("exp_avg_sq"), state.second.items())
        for count in self._moments("step").values():
            count.fill_(state.step)
        self._step = state.step

    def _noise_scale(self) -> float:
        override = self._record.noise_scale
        return self.settings.noise_scale(self._step) if override is None else override

    def _parts(self, batch: Batch) -> Iterator[Batch]:
        """Every `accumulation`-th sample of the batch, on the device but for the places."""
        count = self.settings.accumulation
        for first in range(count):
            part = _map(lambda array: array[first::count], batch)  # noqa: B023
            on_device = _map(lambda array: to_device(array, self._device), part)
            yield dataclasses.replace(on_device, places=part.places)

    def _measures(self, part: Batch) -> Measures:
        """The loss of a part in this step, and how it was pruned."""
        scale = self._noise_scale()
        draws = draw(self.config, self.settings, self._step, scale, part.places, self._device)
        loss, pruning = self._objective(part, draws)
        return Measures(loss=loss, pruning=pruning)

    def _backward(self, part: Batch) -> Measures:
        """Adds to the gradients of the whole batch's mean loss."""
        measures = self._measures(part)
        (measures.loss.mean() / self.settings.accumulation).backward()
        return dataclasses.replace(measures, loss=measures.loss.detach())

    @torch.no_grad()
    def _summarized(self, parts: Sequence[Measures]) -> dict[str, Float[Tensor, ""]]:
        measures = _joined(parts)
        return summarize(measures if self._mesh is None else sharding.gathered(measures))

    @torch.no_grad()
    def _update(self) -> dict[str, Float[Tensor, ""]]:
        """A step of AdamW and of the average; the norms of gradients and parameters."""
        gradients = [_gradient(parameter) for parameter in self._trained.values()]
        norm = _clip(gradients, self.settings.optimizer.clip_gradient_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings.schedule.learning_rate(self._step)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        parameters: list[Tensor] = list(self._trained.values())
        decay = self.settings.ema_decay
        if self._average is not None and decay is not None:
            torch._foreach_lerp_(list(self._average.values()), parameters, 1 - decay)
        return {"grad_norm": norm, "param_norm": _norm(parameters)}

    def _moments(self, kind: str) -> dict[str, Tensor]:
        """What the optimizer holds of this kind, by the parameter's name in the model."""
        return {name: self._optimizer.state[p][kind] for name, p in self._trained.items()}

    @torch.no_grad()
    def _assign(self, tensors: Mapping[str, Tensor], named: Iterable[tuple[str, Any]]) -> None:
        """Copies arrays by our names into those of the tensors that are of their families."""
        dtype, table = master_dtype(self.config), parameter_table(self.config)
        for family, array in named:
            layers = checkpoint.unstacked(np.asarray(array, dtype), table[family])
            for name in tensors.keys() & layers.keys():
                sharding.fill(tensors[name], layers[name])

    def _stacked(
        self, tensors: Mapping[str, Tensor], stack: Callable[..., Any] | None
    ) -> dict[str, Any]:
        """Arrays by our names, in the order of the model's parameters.

        Args:
            tensors: by the model's names.
            stack: makes a family's array; None in a process that only gives its parts.
        """
        found = {}
        for name, parameter in parameter_table(self.config).items():
            if parameter.torch_names[0] in tensors:
                layers = {each: sharding.whole(tensors[each]) for each in parameter.torch_names}
                if stack is not None:
                    found[name] = stack(layers, parameter)
        return found


def _empty(
    config: Pi0Config,
    settings: TrainingSettings,
    trained: Sequence[str],
    mesh: DeviceMesh | None,
) -> Pi0:
    """The model without memory, split over the devices if it is to be."""
    model = Pi0(config, seed=None).to(getattr(torch, master_dtype(config)))
    model.gradient_checkpointing = settings.gradient_checkpointing
    table = parameter_table(config)
    names = {name for family in trained for name in table[family].torch_names}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    if mesh is not None and sharding.is_split(mesh):
        sharding.split(model, mesh)
    return model


def _named(
    config: Pi0Config, settings: TrainingSettings, weights: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters that a run begins with."""
    if weights is None:
        return initial_parameters(config, settings.seed)
    given = checkpoint.read(
        weights, config, missing=settings.weight_missing, ignored=settings.weight_ignored
    )
    return completed(given, config, settings.seed)


def _adamw(parameters: Sequence[nn.Parameter], settings: TrainingSettings) -> torch.optim.AdamW:
    """The optimizer, its moments 0 from the beginning on; the learning rate is set each step."""
    rule = settings.optimizer
    optimizer = torch.optim.AdamW(
        parameters,
        lr=0.0,
        betas=(rule.b1, rule.b2),
        eps=rule.eps,
        weight_decay=rule.weight_decay,
        fused=True,
    )
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return optimizer


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Zeros where the loss does not depend on a parameter: its weight decays all the same."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _clip(gradients: list[Tensor], limit: float) -> Float[Tensor, ""]:
    """Scales the gradients, in place, so that their norm is at most `limit`; the norm before."""
    norm = _norm(gradients)
    torch._foreach_mul_(gradients, torch.where(norm <= limit, 1.0, limit / norm))
    return norm


def _norm(tensors: Sequence[Tensor]) -> Float[Tensor, ""]:
    return sharding.whole(nn.utils.get_total_norm(tensors))


def _map(function: Callable[[Any], Any], batch: Batch) -> Batch:
    """The same batch with `function` applied to every array."""
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return Batch(
        **{
            name: {camera: function(value[camera]) for camera in CAMERAS}
            if isinstance(value, Mapping)
            else function(value)
            for name, value in fields.items()
        }
    )


def _joined(parts: Sequence[Measures]) -> Measures:
    """Measures of all parts as of one batch."""
    loss = torch.cat([part.loss for part in parts])
    prunings = [part.pruning for part in parts if part.pruning is not None]
    if not prunings:
        return Measures(loss=loss, pruning=None)
    names = [field.name for field in dataclasses.fields(Pruning)]
    columns = {name: torch.cat([getattr(each, name) for each in prunings]) for name in names}
    return Measures(loss=loss, pruning=Pruning(**columns))
