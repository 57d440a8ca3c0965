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
from pruner_spec.inference import InferenceSettings
from pruner_spec.observation import EncodingPlan, Observation
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

    def warm_up(
        self, observation: Observation, noise: Float[np.ndarray, "B H A"], num_steps: int
    ) -> None:
        """Makes calls of these sizes as quick as they will be, whatever it takes once."""
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

    def prepared(
        self, observation: Observation, noise: Float[np.ndarray, "B H A"], num_steps: int
    ) -> Callable[[], Any]:
        """Puts the inputs on the device, once.

        Returns:
            A function that computes the actions from them, leaves them there, and returns when
            they are computed.
        """
        ...

    def prefix_length(self, observation: Observation) -> int:
        """Tokens of the prefix, padding counted, that the last batch was sampled from, which was
        this observation."""
        ...

    def stages(
        self, observation: Observation, noise: Float[np.ndarray, "B H A"], num_steps: int
    ) -> dict[str, float]:
        """Milliseconds of each stage of `sample_actions`, by `clocked`: "vision" (which embeds the
        prompt too), "pruning" (the choice and the packing; 0 for a model that does not prune),
        "prefix" and "denoising"."""
        ...

    def sample_kept(
        self,
        observation: Observation,
        noise: Float[np.ndarray, "B H A"],
        num_steps: int,
        kept: Mapping[str, Bool[np.ndarray, "B N"]],
    ) -> Float[np.ndarray, "B H A"]:
        """Actions from patches that were chosen elsewhere, the plain way, of a model that prunes.

        Args:
            observation, noise, num_steps: see `sample_actions`.
            kept: by camera, as `kept` says it; which then says what the model itself would keep.
        """
        ...

    def widened(self) -> "Model":
        """The same numbers in a float32 model, which goes the plain way with products in full
        precision. They are moved: this model is of no use any longer."""
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

    def model(
        self,
        config: Pi0Config,
        weights: Weights | None,
        *,
        fast: bool | None = False,
        settings: InferenceSettings | None = None,
    ) -> Model:
        """A model with its weights.

        Args:
            config: the model's.
            weights: a checkpoint's path, or arrays by name in any layout. None for random ones, of
                the spec's scales, that are drawn on the device.
            fast: the way that is made for speed, in the place of the plain one. None for fast on
                a GPU; PyTorch, which has kernels of its own there, then tries it against the plain
                one as it warms up, and goes back to that where the two are apart.
            settings: of the fast way; None for the defaults. The plain one reads none.

        Raises:
            ValueError: they do not fit, or the framework has no such setting.
        """
        ...

    def devices(self, fsdp_devices: int = 1) -> Devices:
        """All devices there are, together with the processes that were started with this one.

        Args:
            fsdp_devices: over how many of them weights are split.

        Raises:
            ValueError: they cannot be divided so.
        """
        ...


class Probe(Protocol):
    """A framework's device, for measurements.

    Attributes:
        device: "cuda" or "cpu".
        name: of the device, as its maker calls it.
        versions: of the framework and of what it was built with, by name.
    """

    device: str
    name: str
    versions: Mapping[str, str]

    def copy_ms(self, size: int) -> float:
        """Milliseconds in which so many bytes are read, and written elsewhere on the device."""
        ...

    def product_ms(self, size: int, dtype: str) -> float:
        """Milliseconds of the product of two matrices [size, size]."""
        ...

    def peak_bytes(self) -> dict[str, int]:
        """The most memory that was taken since `clear`, or since the process began where that
        cannot be told: "allocated" and "reserved" on a GPU, "resident" on the CPU."""
        ...

    def clear(self) -> None:
        """Gives back the memory that nothing holds any longer, and forgets the peak."""
        ...


_ROUND = 0.05  # seconds that a round of `clocked` takes, about
_MOST_CALLS = 100  # of a round


def clocked(
    function: Callable[[], Any], finish: Callable[[Any], Any], rounds: int = 3
) -> tuple[Any, float]:
    """A function's result, and the milliseconds that a call takes once it has been called before.

    The calls of a round follow each other, and only the last one is waited for: where the device
    is slower than the host that asks it, this is the device's time. The median of the rounds.

    Args:
        function: what is called.
        finish: waits until its result is computed.
        rounds: how many.
    """
    result = finish(function())
    once = _seconds(function, finish, 1)
    calls = min(max(int(_ROUND / once), 1), _MOST_CALLS)
    times = [_seconds(function, finish, calls) for _ in range(rounds)]
    return result, 1e3 * statistics.median(times) / calls


def stage_times(
    stages: Any,
    observation: Observation,
    plan: EncodingPlan,
    noise: Any,
    num_steps: int,
    *,
    capacity: Callable[[Any, Any], int | None],
    finish: Callable[[Any], Any],
) -> dict[str, float]:
    """What `Model.stages` gives, of a backend's `sampling.Stages`.

    Args:
        stages: to be measured.
        observation, noise: on the device.
        plan: of the observation.
        num_steps: Euler steps.
        capacity: patches after pruning, of what was encoded and selected; None where none are.
        finish: waits until a result is computed.
    """
    encoded, vision = clocked(lambda: stages.embed(observation, plan), finish)
    rooms: list[int | None] = []

    def prune() -> Any:
        selection, guess = stages.select(encoded), stages.expected(encoded)
        # As in a call, which asks the device for the number only when it has all else to do.
        rooms.append(capacity(encoded, selection) if guess is None else guess)
        return stages.prune(encoded, selection, rooms[-1])

    prefix, pruning = clocked(prune, finish)
    cache, reading = clocked(lambda: stages.prefill(prefix), finish)
    inputs = (prefix, cache, observation.state, noise, num_steps)
    _, denoising = clocked(lambda: stages.denoise(*inputs), finish)
    is_pruned = rooms[-1] is not None
    return {
        "vision": vision,
        "pruning": pruning if is_pruned else 0.0,
        "prefix": reading,
        "denoising": denoising,
    }


def _seconds(function: Callable[[], Any], finish: Callable[[Any], Any], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls - 1):
        function()
    finish(function())
    return time.perf_counter() - started


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


def probe(name: str) -> Probe:
    """A backend's device; imports its framework."""
    return importlib.import_module(f"pruner_run.probe_{name}").create()
