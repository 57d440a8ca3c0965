"""What the application needs of a framework: NumPy in, NumPy out.

Only `backend_jax` and `backend_torch` know a framework; whoever uses one goes through `load`.
"""

import dataclasses
import importlib
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import Bool, Float

from pruner_spec.config import Pi0Config
from pruner_spec.observation import Observation
from pruner_spec.training import Batch, TrainingSettings, TrainState

Weights = str | os.PathLike[str] | Mapping[str, Any]

# What must be importable for a backend, which is also the name of its pip extra.
_PACKAGES = {"jax": ("jax", "flax"), "torch": ("torch",)}


@dataclasses.dataclass(frozen=True)
class Pruned:
    """What the pruner read and what it kept, for one batch.

    Attributes:
        patches: [B, C, N, D], of all patches.
        prompt: [B, L, D], the tokens of the task.
        prompt_mask: [B, L], False for padding.
        kept: [B, C, N].
    """

    patches: Float[np.ndarray, "B C N D"]
    prompt: Float[np.ndarray, "B L D"]
    prompt_mask: Bool[np.ndarray, "B L"]
    kept: Bool[np.ndarray, "B C N"]


class Model(Protocol):
    """A model with its weights."""

    def sample_actions(
        self, observation: Observation, noise: Float[np.ndarray, "B H A"], num_steps: int
    ) -> Float[np.ndarray, "B H A"]:
        """Actions denoised from the noise; returns when they are computed."""
        ...

    def loss(
        self,
        observation: Observation,
        actions: Float[np.ndarray, "B H A"],
        noise: Float[np.ndarray, "B H A"],
        time: Float[np.ndarray, "B"],
    ) -> Float[np.ndarray, "B H"]:
        """Flow matching's loss of the model as it is deployed: patches are selected hard."""
        ...

    def pruned(self) -> Pruned:
        """The selection in the last sampled batch, of a model that prunes."""
        ...

    def kept(self) -> dict[str, Bool[np.ndarray, "B N"]]:
        """Which patches were kept in the last sampled batch, of a model that prunes, by camera;
        cameras that no sample had are left out."""
        ...

    def stages(
        self, observation: Observation, noise: Float[np.ndarray, "B H A"], num_steps: int
    ) -> dict[str, float]:
        """Milliseconds of each stage of `sample_actions`, run one after the other: "vision" (with
        the pruner's choice), "prefix" and "denoising"."""
        ...

    def stats(self) -> dict[str, Any]:
        """The model's `get_token_pruning_stats`, for the last sampled batch."""
        ...


class Trainer(Protocol):
    """A run's state in a framework, and its steps."""

    def step(self, batch: Batch) -> Mapping[str, Any]:
        """Makes a step; the metrics are numbers on the device, that nothing waits for."""
        ...

    def state(self, *, everywhere: bool = True) -> TrainState | None:
        """The state after the steps that were made, in NumPy; all processes must ask for it.

        Args:
            everywhere: in every process, or else in the first alone, and None in the others. Its
                arrays may then be read only as they are taken, which has to be before a next step.
        """
        ...

    def restore(self, state: TrainState) -> None:
        """Takes a state, of either framework."""
        ...


class Devices(Protocol):
    """The devices that make a run together, of one process or of several.

    Attributes:
        process: the number of this one, from 0.
        processes: how many there are.
        count: of devices, in all processes.
    """

    process: int
    processes: int
    count: int

    def trainer(
        self,
        config: Pi0Config,
        settings: TrainingSettings,
        weights: Weights | None,
        compiled: bool | None = None,
    ) -> Trainer:
        """A run's state before its first step.

        Args:
            config: the model's.
            settings: the run's.
            weights: None for random ones.
            compiled: whether PyTorch's layers are; JAX compiles the step.
        """
        ...

    def largest(self, number: int) -> Any:
        """The largest of the numbers that the processes give; who reads it waits for them all."""
        ...

    def close(self) -> None:
        """Takes leave of the other processes."""
        ...


class Backend(Protocol):
    """A framework.

    Attributes:
        name: as a user chooses it.
        title: as it is printed.
        device: where it computes, such as "cpu".
    """

    name: str
    title: str
    device: str

    def model(self, config: Pi0Config, weights: Weights) -> Model:
        """A model with these weights: a checkpoint's path, or arrays by name in any layout."""
        ...

    def devices(self, fsdp_devices: int = 1) -> Devices:
        """All devices there are, together with the processes that were started with this one.

        Args:
            fsdp_devices: over how many of them weights are split.

        Raises:
            ValueError: they cannot be divided so.
        """
        ...


def clocked(function: Callable[[], Any], finish: Callable[[Any], Any]) -> tuple[Any, float]:
    """A function's result, and the milliseconds that it takes: the median of 3, after a first call.

    Args:
        function: called four times.
        finish: waits until its result is computed.
    """
    result = finish(function())
    times = []
    for _ in range(3):
        started = time.perf_counter()
        finish(function())
        times.append(1e3 * (time.perf_counter() - started))
    return result, statistics.median(times)


def missing() -> list[str]:
    """The backends whose framework is not installed."""
    return [
        name
        for name, packages in _PACKAGES.items()
        if any(importlib.util.find_spec(package) is None for package in packages)
    ]


def choose(choice: Literal["jax", "torch", "both"] | None) -> list[str]:
    """The backends to run, none of them imported yet.

    Args:
        choice: None for all that are installed, of which there must be one.

    Raises:
        ValueError: a framework that is needed is not installed; names the pip extra.
    """
    absent = missing()
    installed = [name for name in _PACKAGES if name not in absent]
    if choice is None and installed:
        return installed
    wanted = list(_PACKAGES) if choice in (None, "both") else [choice]
    if lacking := [name for name in wanted if name in absent]:
        raise ValueError(
            f"backend: expected {' and '.join(wanted)} to be installed, but "
            f"{' and '.join(lacking)} cannot be found; {how_to_install(lacking)}"
        )
    return wanted


def how_to_install(names: Sequence[str]) -> str:
    """The command that installs these backends."""
    return f"pip install 'pi05-pruner[{','.join(names)}]'"


def load(name: str) -> Backend:
    """Imports a backend, and with it its framework."""
    return importlib.import_module(f"pruner_run.backend_{name}").create()
