"""The environment "metaworld:TASK": Meta-World's fifty tasks, with its scripted policies.

The state is what a robot would measure, the gripper's place and opening; the expert alone sees
where things are. Shadows are off, as in `aloha`. The simulator is imported by the constructor.
"""

import os
import warnings

import numpy as np
from jaxtyping import Float, UInt8

from pruner_run.simulation.environment import EnvironmentSpec, Observation, Step, check_action
from pruner_spec.config import CAMERAS, IMAGE_SIZE

FPS = 80
_MAX_STEPS = 500
_BASE, _WRIST = CAMERAS[:2]
# The model's name -> the name in the scene, and whether that camera is mounted upside down.
_CAMERAS = {_BASE: ("corner2", True), _WRIST: ("gripperPOV", False)}
_STATE = 4


class MetaWorld:
    """One task of Meta-World, or several."""

    def __init__(self, argument: str) -> None:
        """Builds them.

        Args:
            argument: names of tasks, such as "door-open-v3" or "reach-v3,push-v3".

        Raises:
            ImportError: Meta-World is not installed.
            ValueError: it has no such task.
        """
        os.environ.setdefault("MUJOCO_GL", "egl")  # read when mujoco is first imported
        try:
            import mujoco
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS
            from metaworld.policies import ENV_POLICY_MAP
        except ImportError as error:
            raise ImportError(
                "the simulator needs Meta-World: pip install metaworld==3.0.0 packaging"
            ) from error
        tasks = tuple(argument.split(","))
        for task in tasks:
            if task not in ALL_V3_ENVIRONMENTS:
                known = ", ".join(ALL_V3_ENVIRONMENTS)
                raise ValueError(f"env: expected tasks of Meta-World ({known}), got {task!r}")
        self._mujoco, self._classes, self._experts = mujoco, ALL_V3_ENVIRONMENTS, ENV_POLICY_MAP
        self._task, self._renderer = "", None
        self.spec = EnvironmentSpec(
            name=f"metaworld:{argument}",
            tasks=tasks,
            robot="plain",
            cameras=tuple(_CAMERAS),
            state=("x", "y", "z", "opening"),
            actions=("dx", "dy", "dz", "closing"),
            fps=FPS,
            max_steps=_MAX_STEPS,
            has_expert=True,
        )

    def reset(self, task: str, seed: int) -> Observation:
        if task != self._task:
            self._open(task)
        self._environment.seed(seed)
        self._seen, _ = self._environment.reset()
        self._expert = self._experts[task]()
        return self._observation()

    def step(self, action: Float[np.ndarray, "4"] | None, *, observe: bool = True) -> Step:
        if action is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it asks for more than 1, which is clipped
                action = self._expert.get_action(self._seen)
        action = np.clip(check_action(action, self.spec), -1.0, 1.0)
        self._seen, _, _, truncated, info = self._environment.step(action)
        return Step(
            action=action,
            success=bool(info["success"]),
            done=bool(truncated),
            observation=self._observation() if observe else None,
        )

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._environment.close()

    def _open(self, task: str) -> None:
        """Builds a task's scene; its objects are where the seed says, and the expert sees them."""
        self.close()
        environment = self._classes[task]()
        environment._set_task_called = True
        environment._freeze_rand_vec = False
        environment.seeded_rand_vec = True
        environment._partially_observable = False
        del environment.sawyer_observation_space  # cached, with the goal hidden
        environment.model.vis.quality.shadowsize = 0
        environment.model.vis.quality.offsamples = 0
        self._task, self._environment = task, environment
        self._renderer = self._mujoco.Renderer(environment.model, IMAGE_SIZE, IMAGE_SIZE)

    def _observation(self) -> Observation:
        images = {f"image/{camera}": self._render(*place) for camera, place in _CAMERAS.items()}
        prompt = self._task.rpartition("-")[0].replace("-", " ")
        return images | {"state": self._seen[:_STATE].astype(np.float32), "prompt": prompt}

    def _render(self, camera: str, upside_down: bool) -> UInt8[np.ndarray, "H W 3"]:
        self._renderer.update_scene(self._environment.data, camera=camera)
        image = self._renderer.render()
        return np.ascontiguousarray(image[::-1, ::-1]) if upside_down else image
