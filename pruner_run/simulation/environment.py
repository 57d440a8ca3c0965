"""What a simulator is to the rest: episodes of tasks, begun by a seed and advanced by actions.

An observation is openpi's dictionary of the robot "plain": "image/<the model's camera>", each
[H, W, 3] of uint8, "state", and "prompt". Images are rendered when they are asked for, as this is
what takes the time.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from pruner_run.data.robots import RobotName
from pruner_spec.config import IMAGE_SIZE

Observation = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnvironmentSpec:
    """What is fixed about an environment.

    Attributes:
        name: as `make` takes it.
        tasks: names of its tasks.
        robot: whose dictionaries a policy is given that does not say which it takes.
        cameras: the model's names of them.
        state: names of the state's numbers.
        actions: names of an action's numbers.
        fps: actions a second.
        max_steps: actions after which an episode has failed.
        has_expert: whether `step` can act itself.
        image_size: height and width of an image, pixels.
    """

    name: str
    tasks: tuple[str, ...]
    robot: RobotName
    cameras: tuple[str, ...]
    state: tuple[str, ...]
    actions: tuple[str, ...]
    fps: int
    max_steps: int
    has_expert: bool
    image_size: int = IMAGE_SIZE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What an action led to.

    Attributes:
        action: that was executed.
        success: whether the task is solved now.
        done: whether the episode can go no further, solved or not.
        observation: after it, if one was asked for.
    """

    action: Float[np.ndarray, "A"]
    success: bool
    done: bool
    observation: Observation | None


class Environment(Protocol):
    """A simulator.

    Attributes:
        spec: what is fixed about it.
    """

    spec: EnvironmentSpec

    def reset(self, task: str, seed: int) -> Observation:
        """Begins an episode. The same seed gives the same episode."""
        ...

    def step(self, action: Float[np.ndarray, "A"] | None, *, observe: bool = True) -> Step:
        """Executes an action; None for the scripted expert's.

        Raises:
            ValueError: the action does not fit, or there is no expert.
        """
        ...

    def close(self) -> None:
        """Frees what it holds."""
        ...


def make(name: str) -> Environment:
    """An environment by name: "aloha_sim", "metaworld:TASK" or "libero:SUITE".

    Raises:
        ValueError: there is none of the name.
        ImportError: its package is not installed; says how to.
        FileNotFoundError: it needs files that are a download; says how to get them.
    """
    kind, _, argument = name.partition(":")
    if kind not in _MAKERS:
        known = ", ".join(_NAMES)
        raise ValueError(f"env: expected one of {known}, got {name!r}")
    return _MAKERS[kind](argument)


def check_action(action: Float[np.ndarray, "A"], spec: EnvironmentSpec) -> Float[np.ndarray, "A"]:
    """The action as float64.

    Raises:
        ValueError: it has another length than the environment's, or is not finite.
    """
    action = np.asarray(action, np.float64)
    if action.shape != (length := (len(spec.actions),)):
        raise ValueError(f"{spec.name}: expected actions of shape {length}, got {action.shape}")
    if not np.isfinite(action).all():
        raise ValueError(f"{spec.name}: expected a finite action, got {action.tolist()}")
    return action


def _aloha_sim(argument: str) -> Environment:
    from pruner_run.simulation.aloha_sim import AlohaSim

    return AlohaSim(argument)


def _metaworld(argument: str) -> Environment:
    from pruner_run.simulation.metaworld_sim import MetaWorld

    return MetaWorld(argument)


def _libero(argument: str) -> Environment:
    from pruner_run.simulation.libero_sim import Libero

    return Libero(argument)


_MAKERS: Mapping[str, Callable[[str], Environment]] = {
    "aloha_sim": _aloha_sim,
    "metaworld": _metaworld,
    "libero": _libero,
}
_NAMES = ("aloha_sim", "aloha_sim:FPS", "metaworld:TASK", "metaworld:TASK,TASK", "libero:SUITE")
