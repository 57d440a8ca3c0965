"""A simulator that simulates nothing: its state counts the steps, and its actions decide."""

import os
import signal
import time

import numpy as np

from pruner_run.kept_bits import packed
from pruner_run.simulation.environment import EnvironmentSpec, Step, check_action
from pruner_spec.config import CAMERAS

SPEC = EnvironmentSpec(
    name="counter",
    tasks=("first", "second"),
    robot="plain",
    cameras=CAMERAS[:2],
    state=("seed", "steps"),
    actions=("a", "b", "c"),
    fps=10,
    max_steps=20,
    has_expert=True,
)


class Counter:
    """Solved by as many steps with a positive first number as the seed, from 1; the expert's have.

    Attributes:
        observed: the steps after which it was looked at.
    """

    spec = SPEC

    def __init__(self, name: str = "") -> None:
        self.observed: list[int] = []
        self.restarts = 0

    def reset(self, task, seed):
        self._task, self._seed, self._steps, self._right = task, seed, 0, 0
        return self._observation()

    def step(self, action, *, observe=True):
        action = np.ones(3) if action is None else check_action(action, self.spec)
        self._steps += 1
        self._right += int(action[0] > 0)
        return Step(
            action=action,
            success=self._right >= max(self._seed, 1),
            done=False,
            observation=self._observation() if observe else None,
        )

    def restart(self):
        self.restarts += 1

    def close(self):
        pass

    def _observation(self):
        self.observed.append(self._steps)
        images = {f"image/{c}": np.full((224, 224, 3), self._steps, np.uint8) for c in CAMERAS[:2]}
        state = np.array([self._seed, self._steps], np.float32)
        return images | {"state": state, "prompt": f"do the {self._task}"}


class Mortal(Counter):
    """Its process is killed in the third step of an episode whose seed is 7."""

    def step(self, action, *, observe=True):
        if self._seed == 7 and self._steps == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action, observe=observe)


class Faulty(Counter):
    """Fails in its own way in the first step."""

    def step(self, action, *, observe=True):
        raise RuntimeError("the physics have exploded")


class Silent(Counter):
    """Never answers."""

    def step(self, action, *, observe=True):
        time.sleep(600)


def missing(name):
    """A simulator whose package is not there."""
    raise ImportError("the simulator needs a package: pip install it")


def loaded(name):
    """Raises a ValueError with the frameworks that the process has loaded."""
    import sys

    raise ValueError(f"loaded: {sorted({'jax', 'torch'} & sys.modules.keys())}")


class Actor:
    """A policy whose n-th chunk is n, n + 0.1, n + 0.2 ... in every number.

    Attributes:
        seen: the observations.
    """

    def __init__(self, horizon=4, dims=3, first=1.0, **metadata):
        self.metadata = metadata
        self.seen = []
        self._shape, self._first = (horizon, dims), first

    def infer(self, observation):
        actions = np.empty(self._shape)
        actions[:] = self._first * (len(self.seen) + 0.1 * np.arange(self._shape[0])[:, None])
        self.seen.append(observation)
        bits = {"base_0_rgb": packed(np.arange(256) < 5)}
        pruning = {"kept": {"base_0_rgb": 5}, "kept_total": 4 + len(self.seen), "patches": 256}
        pruning["kept_bits"] = bits
        return {"actions": actions, "policy_timing": {}, "pruning": pruning}
