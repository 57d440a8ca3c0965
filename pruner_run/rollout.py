"""Episodes of a policy in a simulator, and what is measured of them.

A policy is asked for a chunk of actions, some of which are executed before it is asked again, as
openpi's clients do it.
"""

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from pruner_run.data.robots import ROBOTS, RobotName
from pruner_run.simulation.environment import Environment, EnvironmentSpec, Observation, Step

logger = logging.getLogger(__name__)


class Actor(Protocol):
    """A policy, here or on a server.

    Attributes:
        metadata: what it says of itself; its "robot", if it has one, is whose observations it
            takes.
    """

    metadata: dict[str, Any]

    def infer(self, observation: Mapping[str, Any]) -> Mapping[str, Any]:
        """An answer with "actions" [H, A], and perhaps what was pruned."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episode:
    """An episode, measured.

    Attributes:
        task: its name.
        seed: it was begun by.
        success: whether the task was solved.
        steps: actions until it was, or until there was no more time.
        jerk: see `jerk`; None where there are fewer than four actions.
        infer_ms: milliseconds from each observation to its answer.
        tokens_kept: image tokens in each answer's prefix, where the policy says.
    """

    task: str
    seed: int
    success: bool
    steps: int
    jerk: float | None
    infer_ms: list[float]
    tokens_kept: list[int]


class Restartable(Environment, Protocol):
    """A simulator in a process."""

    def restart(self) -> None:
        """Starts another process in place of one that failed."""
        ...


class Camera(Protocol):
    """Sees every step of an episode."""

    def begin(self, observation: Observation) -> None:
        """Sees the start."""
        ...

    def answered(self, answer: Mapping[str, Any]) -> None:
        """Hears what the policy answered to what was seen last."""
        ...

    def see(self, step: Step) -> None:
        """Sees a step."""
        ...


def run_episode(
    environment: Environment,
    actor: Actor | None,
    task: str,
    seed: int,
    *,
    replan_steps: int | None = None,
    camera: Camera | None = None,
) -> Episode:
    """One episode, until the task is solved or cannot be any more.

    Args:
        environment: the simulator.
        actor: None for the environment's scripted expert.
        task: its name.
        seed: that it begins by.
        replan_steps: actions of a chunk that are executed; None for all.
        camera: if it is filmed, for which every step is rendered.

    Raises:
        ValueError: the policy or the simulator refuses what it is given, or the policy's chunks
            are shorter than `replan_steps`.
        OSError: the simulator or the server is gone.
    """
    spec = environment.spec
    observation: Observation | None = environment.reset(task, seed)
    if camera is not None:
        camera.begin(observation)
    actions, infer_ms, kept, success, chunk = [], [], [], False, []
    done = False
    while not done:
        action = None
        if actor is not None:
            if not chunk:
                assert observation is not None, "asked for where the chunk ended"
                started = time.perf_counter()
                answer = actor.infer(observation_of(observation, robot_of(actor, spec)))
                infer_ms.append(1e3 * (time.perf_counter() - started))
                kept += _tokens_kept(answer)
                chunk = _chunk(answer, spec, replan_steps)
                if camera is not None:
                    camera.answered(answer)
            action = chunk.pop(0)
        last = len(actions) + 1 == spec.max_steps
        observe = camera is not None or (actor is not None and not chunk and not last)
        step = environment.step(action, observe=observe)
        if camera is not None:
            camera.see(step)
        actions.append(step.action)
        observation, success = step.observation, step.success
        done = success or step.done or last
    return Episode(
        task=task,
        seed=seed,
        success=success,
        steps=len(actions),
        jerk=jerk(np.stack(actions), spec.fps),
        infer_ms=infer_ms,
        tokens_kept=kept,
    )


def run_episodes(
    simulator: Restartable,
    run_one: Callable[[str, int], Episode],
    seeds: Sequence[int],
) -> Iterator[Episode]:
    """Every task with every seed. A simulator that fails is started again, once an episode.

    Args:
        simulator: whose tasks they are.
        run_one: runs an episode of a task and a seed in it.
        seeds: of each task's episodes.

    Raises:
        ChildProcessError: the simulator failed in the same episode twice.
    """
    for task, seed in itertools.product(simulator.spec.tasks, seeds):
        try:
            episode = run_one(task, seed)
        except ChildProcessError as error:
            logger.warning("%s; %s, seed %d once more, in another process", error, task, seed)
            simulator.restart()
            episode = run_one(task, seed)
        yield episode


def jerk(actions: Float[np.ndarray, "T A"], fps: float) -> float | None:
    """How abruptly actions change: the root mean square of their third derivative.

    The derivative is the third difference times fps³, in the actions' units a second³; the mean is
    over time and over the numbers of an action. An action that changes by a constant, or whose
    change does, has none.
    """
    if len(actions) < 4:
        return None
    third = np.diff(np.asarray(actions, np.float64), n=3, axis=0) * float(fps) ** 3
    return float(np.sqrt(np.mean(third**2)))


def robot_of(actor: Actor, spec: EnvironmentSpec) -> RobotName:
    """Whose observations a policy takes: what it says, or the environment's own."""
    return actor.metadata.get("robot", spec.robot)


def observation_of(observation: Observation, robot: RobotName) -> dict[str, Any]:
    """An environment's observation as openpi's dictionary for a robot.

    Cameras that the robot has no place for are left out. ALOHA's images are [3, H, W], as openpi's
    own policies want them.

    Raises:
        ValueError: the robot's state has several parts.
    """
    row = ROBOTS[robot]
    if len(row.state) != 1:
        raise ValueError(f"robot: expected one whose state is one vector, got {robot!r}")
    images = {
        key: np.ascontiguousarray(image.transpose(2, 0, 1)) if robot == "aloha" else image
        for camera, key in row.cameras.items()
        if (image := observation.get(f"image/{camera}")) is not None
    }
    found: dict[str, Any] = {**images, row.state[0]: observation["state"]}
    found["prompt"] = observation["prompt"]
    return _nested(found) if robot == "aloha" else found


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """ALOHA's images are a dictionary in the dictionary; others' keys have their "/"."""
    nested: dict[str, Any] = {"images": {}}
    for key, value in flat.items():
        folder, _, name = key.rpartition("/")
        (nested[folder] if folder else nested)[name] = value
    return nested


def _tokens_kept(answer: Mapping[str, Any]) -> list[int]:
    pruning = answer.get("pruning")
    return [] if pruning is None else [int(pruning["kept_total"])]


def _chunk(
    answer: Mapping[str, Any], spec: EnvironmentSpec, replan_steps: int | None
) -> list[np.ndarray]:
    """The actions that are executed before the next answer."""
    actions = np.asarray(answer["actions"])
    expected = f"[H, {len(spec.actions)}]"
    if actions.ndim != 2 or actions.shape[1] != len(spec.actions) or not len(actions):
        raise ValueError(
            f"{spec.name}: expected actions of shape {expected}, got {list(actions.shape)}"
        )
    if replan_steps is not None and replan_steps > len(actions):
        raise ValueError(
            f"replan_steps: expected at most the {len(actions)} actions of a chunk, got "
            f"{replan_steps}"
        )
    return list(actions[:replan_steps])
