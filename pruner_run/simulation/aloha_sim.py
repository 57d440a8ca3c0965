"""The environment "aloha_sim": transfer-cube, at 25 actions a second or as many as are named."""

import math
from collections import deque

import numpy as np
from jaxtyping import Float

from pruner_run.simulation import expert
from pruner_run.simulation.aloha import CAMERAS, STATE_NAMES, SUCCESS, TransferCube
from pruner_run.simulation.environment import EnvironmentSpec, Observation, Step, check_action
from pruner_spec.config import IMAGE_SIZE

_FPS = 25  # of the shipped episode; gym-aloha's own, and openpi's, is 50
_TASK = "transfer_cube"
_HOLD_SECONDS = 0.5


class AlohaSim:
    """Transfer-cube. It is solved while the left arm has held the cube clear of the table for half
    a second, in which one measurement may miss the contact, as happens with a hand that is moved.
    gym-aloha asks for one instant, which an arm that bats the cube away may have too."""

    def __init__(self, argument: str = "") -> None:
        """Builds it.

        Args:
            argument: actions a second; "" for 25.
        """
        if argument and not argument.isdecimal():
            raise ValueError(f"env: expected 'aloha_sim:FPS', got 'aloha_sim:{argument}'")
        fps = int(argument) if argument else _FPS
        self._cube = TransferCube(fps=fps, image_size=IMAGE_SIZE)
        self.spec = EnvironmentSpec(
            name=f"aloha_sim:{argument}" if argument else "aloha_sim",
            tasks=(_TASK,),
            robot="aloha",
            cameras=tuple(CAMERAS),
            state=STATE_NAMES,
            actions=STATE_NAMES,
            fps=fps,
            max_steps=round(expert.DURATION * fps),
            has_expert=True,
        )
        self._plan, self._steps = np.zeros((0, len(STATE_NAMES))), 0
        self._held: deque[bool] = deque(maxlen=math.ceil(_HOLD_SECONDS * fps))

    def reset(self, task: str, seed: int) -> Observation:
        self._cube.reset(seed)
        self._plan = expert.plan(self._cube.cube[:2], fps=self.spec.fps)
        self._steps = 0
        self._held.clear()
        return self._observation()

    def step(self, action: Float[np.ndarray, "14"] | None, *, observe: bool = True) -> Step:
        action = self._plan[self._steps] if action is None else check_action(action, self.spec)
        self._steps += 1
        self._held.append(self._cube.step(action) == SUCCESS)
        return Step(
            action=action,
            success=self._is_held,
            done=self._steps == self.spec.max_steps,
            observation=self._observation() if observe else None,
        )

    def close(self) -> None:
        pass

    @property
    def _is_held(self) -> bool:
        held = self._held
        is_long = len(held) == held.maxlen and held[0] and held[-1]
        return bool(is_long and sum(held) >= len(held) - 1)

    def _observation(self) -> Observation:
        images = {f"image/{camera}": image for camera, image in self._cube.render().items()}
        return images | {"state": self._cube.state, "prompt": self._cube.instruction}
