"""What the application needs of a framework: NumPy in, NumPy out.

Only `backend_jax` and `backend_torch` know a framework; whoever uses one goes through `load`.
"""

import dataclasses
import importlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
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

    def stats(self) -> dict[str, Any]:
        """The model's `get_token_pruning_stats`, for the last sampled batch."""
        ...


class Trainer(Protocol):
    """A run's state in a framework, and its steps."""

    def step(self, batch: Batch) -> Mapping[str, Any]:
        """Makes a step; the metrics are numbers on the device, that nothing waits for."""
        ...

    def state(self) -> TrainState:
        """The state after the steps that were made, in NumPy."""
        ...

    def restore(self, state: TrainState) -> None:
        """Takes a state, of either framework."""
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

    def trainer(
        self, config: Pi0Config, settings: TrainingSettings, weights: Weights | None
    ) -> Trainer:
        """A run's state before its first step; without weights, with random ones."""
        ...


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
