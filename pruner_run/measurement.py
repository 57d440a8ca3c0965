"""One backend, with and without pruning, on the frames of a recording."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from pruner_run.backend import Backend, Model, Pruned
from pruner_spec.config import Pi0Config
from pruner_spec.observation import Observation


@dataclasses.dataclass(frozen=True)
class Calls:
    """Actions of T frames, sampled one by one as on a robot, and how long that took.

    Attributes:
        actions: [T, H, A].
        first: seconds of the first call, in which a compiling backend compiles.
        warm: median seconds of a call, each frame's second.
    """

    actions: Float[np.ndarray, "T H A"]
    first: float
    warm: float


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What a backend made of a recording.

    Attributes:
        backend: its name.
        title: its name as it is printed.
        device: where it computed.
        unpruned: the calls of the model without pruning.
        pruned: the calls of the model that prunes, with the same weights.
        selection: what the pruner read and kept, a batch of T.
        top_votes_share: votes of the most voted patch over all, a mean; near 1 when the selection
            has collapsed.
        queries_spread: how much the patches' queries differ, a mean; 0 when all are equal.
    """

    backend: str
    title: str
    device: str
    unpruned: Calls
    pruned: Calls
    selection: Pruned
    top_votes_share: float
    queries_spread: float


def measure(
    backend: Backend,
    config: Pi0Config,
    parameters: Mapping[str, np.ndarray],
    observation: Observation,
    noise: Float[np.ndarray, "T H A"],
    num_steps: int,
) -> Measurement:
    """Samples every frame with and without pruning.

    Args:
        backend: the framework.
        config: of the model that prunes.
        parameters: of both models.
        observation: a batch of T frames.
        noise: that the actions are denoised from.
        num_steps: of denoising.
    """
    unpruned = _Sampler(
        backend.model(dataclasses.replace(config, token_pruning_enabled=False), parameters)
    )
    pruned = _Sampler(backend.model(config, parameters))
    selections, diagnostics = [], []
    for place in range(observation.batch_size):
        frame = observation.map(lambda array, at=place: array[at : at + 1])
        unpruned.sample(frame, noise[place : place + 1], num_steps)
        pruned.sample(frame, noise[place : place + 1], num_steps)
        selections.append(pruned.model.pruned())
        diagnostics.append(pruned.model.stats()["diagnostics"])
    return Measurement(
        backend=backend.name,
        title=backend.title,
        device=backend.device,
        unpruned=unpruned.calls(),
        pruned=pruned.calls(),
        selection=_concatenate(selections),
        top_votes_share=_mean(diagnostics, "top_votes_share"),
        queries_spread=_mean(diagnostics, "queries_normalized_spread"),
    )


class _Sampler:
    """A model, and the times of its calls."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._actions: list[np.ndarray] = []
        self._first: list[float] = []
        self._second: list[float] = []

    def sample(self, frame: Observation, noise: np.ndarray, num_steps: int) -> None:
        """Twice, since the first call may compile for a length not seen before."""
        for seconds in (self._first, self._second):
            start = time.perf_counter()
            actions = self.model.sample_actions(frame, noise, num_steps)
            seconds.append(time.perf_counter() - start)
        self._actions.append(actions)

    def calls(self) -> Calls:
        return Calls(
            actions=np.concatenate(self._actions),
            first=self._first[0],
            warm=float(np.median(self._second)),
        )


def _concatenate(selections: list[Pruned]) -> Pruned:
    """A batch of batches; prompts of one length, since all are of one recording."""
    names = [field.name for field in dataclasses.fields(Pruned)]
    return Pruned(
        **{name: np.concatenate([getattr(each, name) for each in selections]) for name in names}
    )


def _mean(diagnostics: list[dict[str, Any]], name: str) -> float:
    return float(np.mean([each[name] for each in diagnostics]))
