"""`pruner record`: a simulator's scripted expert as a LeRobot dataset.

The images are those that a policy is shown in `pruner eval`: same cameras, same renderer.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console

from pruner_run.data.lerobot_features import Feature
from pruner_run.data.lerobot_writer import write_dataset
from pruner_run.simulation.environment import Environment, EnvironmentSpec
from pruner_run.simulation.process import SimulatorProcess

_STATE, _ACTION = "observation.state", "action"
_FAILURES = 3  # for each episode that is wanted; more, and the expert is no good


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Record episodes of a simulator as a LeRobot dataset, version 3.0, for training.

    Attributes:
        env: aloha_sim, aloha_sim:FPS, metaworld:TASK or metaworld:TASK,TASK.
        policy: who acts.
        episodes: of each task.
        seed: of the first; each further one has the next.
        keep_failures: also those in which the task is not solved at the end.
        settle_seconds: that an episode goes on once the task is solved.
        output: the dataset's folder.
    """

    env: str
    policy: Literal["expert"] = "expert"
    episodes: int = 10
    seed: int = 0
    keep_failures: tyro.conf.FlagCreatePairsOff[bool] = False
    settle_seconds: float = 1.0
    output: Path


def run(options: Options) -> None:
    """Records them.

    Raises:
        ValueError: an option does not fit, the environment has no expert, or the expert fails.
        OSError: the output is there already or cannot be written, or the simulator fails.
    """
    if options.episodes < 1:
        raise ValueError(f"episodes: expected at least 1, got {options.episodes}")
    if options.settle_seconds < 0:
        raise ValueError(f"settle_seconds: expected at least 0, got {options.settle_seconds}")
    if options.output.exists():
        raise FileExistsError(f"output: expected nothing there, got {options.output}")
    options.output.absolute().parent.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    with SimulatorProcess(options.env) as simulator:
        if not simulator.spec.has_expert:
            raise ValueError(f"env: expected one with a scripted expert, got {options.env}")
        write_dataset(
            options.output,
            _episodes(simulator, options, console),
            fps=simulator.spec.fps,
            features=features(simulator.spec),
            robot_type=simulator.spec.robot,
        )
    console.print(f"Wrote {options.output}")


def features(spec: EnvironmentSpec) -> dict[str, Feature]:
    """What a dataset of an environment holds; its names are those that the robot "plain" reads."""
    shape = (spec.image_size, spec.image_size, 3)
    return {
        _STATE: Feature("float32", (len(spec.state),), spec.state),
        _ACTION: Feature("float32", (len(spec.actions),), spec.actions),
        **{f"observation.images.{camera}": Feature("video", shape) for camera in spec.cameras},
    }


def record_episode(
    environment: Environment, task: str, seed: int, *, settle_seconds: float
) -> tuple[dict[str, Any], bool]:
    """The expert's episode as `write_dataset` takes it, and whether the task is solved at its end.

    Each frame is what was seen and measured before its action.
    """
    spec = environment.spec
    settle = round(settle_seconds * spec.fps)
    observation = environment.reset(task, seed)
    frames: dict[str, list[Any]] = {key: [] for key in features(spec)}
    solved = 0  # steps since the task was first solved
    while solved <= settle:
        frames[_STATE].append(observation["state"])
        for camera in spec.cameras:
            frames[f"observation.images.{camera}"].append(observation[f"image/{camera}"])
        step = environment.step(None)
        frames[_ACTION].append(step.action.astype(np.float32))
        if solved or step.success:
            solved += 1
        if step.done or len(frames[_ACTION]) == spec.max_steps:
            break
        assert step.observation is not None
        observation = step.observation
    episode: dict[str, Any] = {key: np.stack(values) for key, values in frames.items()}
    return episode | {"task": observation["prompt"]}, step.success


def _episodes(
    simulator: Environment, options: Options, console: Console
) -> Iterator[dict[str, Any]]:
    """As many as are wanted of every task."""
    record = functools.partial(record_episode, settle_seconds=options.settle_seconds)
    for task in simulator.spec.tasks:
        found, seed = 0, options.seed
        while found < options.episodes:
            episode, solved = record(simulator, task, seed)
            outcome = "solved" if solved else "not solved"
            console.print(f"{task}, seed {seed}: {outcome}, {len(episode[_ACTION])} frames")
            seed += 1
            if solved or options.keep_failures:
                found += 1
                yield episode
            elif seed - options.seed - found > _FAILURES * options.episodes:
                raise ValueError(
                    f"{task}: expected {options.episodes} solved episodes of the expert, got "
                    f"{found} of {seed - options.seed}"
                )
