"""The environment "libero:SUITE", driven as openpi's example drives it.

Its package, hf-libero, has the tasks and their initial states; meshes and textures are a download
of their own. Importing it imports PyTorch, which reads the initial states, and asks a question on
the terminal where it has no configuration: it is given one.
"""

import json
import math
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from jaxtyping import Float

from pruner_run.data.images import resize_with_pad
from pruner_run.simulation.environment import EnvironmentSpec, Observation, Step, check_action
from pruner_spec.config import CAMERAS

FPS = 20
_MAX_STEPS = {  # openpi's: a little more than the longest demonstration
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
_RENDER_SIZE = 256
_SETTLING = 10  # steps in which the objects fall into place
_DO_NOTHING = [0.0] * 6 + [-1.0]
_ASSETS = ("articulated_objects", "stable_scanned_objects", "turbosquid_objects")
_CAMERAS = {CAMERAS[0]: "agentview_image", CAMERAS[1]: "robot0_eye_in_hand_image"}


class Libero:
    """A suite of LIBERO. A seed is one of a task's recorded initial states."""

    def __init__(self, argument: str) -> None:
        """Reads the suite.

        Args:
            argument: its name, such as "libero_spatial".

        Raises:
            ValueError: there is no such suite.
            ImportError: the package is not installed.
            FileNotFoundError: its meshes and textures have not been downloaded.
        """
        if argument not in _MAX_STEPS:
            known = ", ".join(f"libero:{suite}" for suite in _MAX_STEPS)
            raise ValueError(f"env: expected one of {known}; got 'libero:{argument}'")
        os.environ.setdefault("MUJOCO_GL", "egl")
        _check_assets(_package())
        from libero.libero import benchmark
        from libero.libero.envs import OffScreenRenderEnv

        self._make = OffScreenRenderEnv
        self._suite = benchmark.get_benchmark_dict()[argument]()
        self._numbers = {name: n for n, name in enumerate(self._suite.get_task_names())}
        self._task, self._environment, self._prompt = "", None, ""
        self.spec = EnvironmentSpec(
            name=f"libero:{argument}",
            tasks=tuple(self._numbers),
            robot="libero",
            cameras=tuple(_CAMERAS),
            state=("x", "y", "z", "rx", "ry", "rz", "finger_left", "finger_right"),
            actions=("dx", "dy", "dz", "drx", "dry", "drz", "gripper"),
            fps=FPS,
            max_steps=_MAX_STEPS[argument],
            has_expert=False,
        )

    def reset(self, task: str, seed: int) -> Observation:
        if task != self._task:
            self._open(task)
        self._environment.reset()
        self._seen = self._environment.set_init_state(self._states[seed % len(self._states)])
        for _ in range(_SETTLING):
            self._seen, *_ = self._environment.step(_DO_NOTHING)
        self._steps = 0
        return self._observation()

    def step(self, action: Float[np.ndarray, "7"] | None, *, observe: bool = True) -> Step:
        if action is None:
            raise ValueError(f"{self.spec.name}: expected a policy, as there is no scripted expert")
        action = check_action(action, self.spec)
        self._seen, _, success, _ = self._environment.step(action.tolist())
        self._steps += 1
        return Step(
            action=action,
            success=bool(success),
            done=bool(success) or self._steps == self.spec.max_steps,
            observation=self._observation() if observe else None,
        )

    def close(self) -> None:
        if self._environment is not None:
            self._environment.close()

    def _open(self, task: str) -> None:
        self.close()
        number = self._numbers[task]
        size = {"camera_heights": _RENDER_SIZE, "camera_widths": _RENDER_SIZE}
        scene = self._suite.get_task_bddl_file_path(number)
        self._environment = self._make(bddl_file_name=scene, **size)
        self._environment.seed(0)  # of what the initial states do not say
        self._states = self._suite.get_task_init_states(number)
        self._task, self._prompt = task, self._suite.get_task(number).language

    def _observation(self) -> Observation:
        seen = self._seen
        images = {  # upside down, as the simulator renders them, and LIBERO's datasets turn them
            f"image/{camera}": resize_with_pad(np.ascontiguousarray(seen[key][::-1, ::-1]))
            for camera, key in _CAMERAS.items()
        }
        turned = axis_angle(seen["robot0_eef_quat"])
        state = np.concatenate([seen["robot0_eef_pos"], turned, seen["robot0_gripper_qpos"]])
        return images | {"state": state.astype(np.float32), "prompt": self._prompt}


def axis_angle(quaternion: Float[np.ndarray, "4"]) -> Float[np.ndarray, "3"]:
    """A rotation's axis times its angle in radians, of a unit quaternion (x, y, z, w)."""
    x, y, z, w = quaternion
    w = min(max(w, -1.0), 1.0)
    sine = math.sqrt(1.0 - w * w)
    if math.isclose(sine, 0.0):
        return np.zeros(3)
    return np.array([x, y, z]) * 2.0 * math.acos(w) / sine


def _package() -> Path:
    """The package's folder; LIBERO_CONFIG_PATH has a configuration that names it."""
    found = find_spec("libero")
    if found is None or found.submodule_search_locations is None:
        raise ImportError("the simulator needs LIBERO: pip install hf-libero==0.1.4")
    package = Path(found.submodule_search_locations[0]) / "libero"
    given = Path(os.environ.get("LIBERO_CONFIG_PATH", Path.home() / ".libero"))
    if not (given / "config.yaml").is_file():
        places = {"bddl_files": "bddl_files", "init_states": "init_files", "assets": "assets"}
        config = {key: str(package / place) for key, place in places.items()}
        folder = Path(tempfile.mkdtemp(prefix="libero-"))
        text = json.dumps(config | {"benchmark_root": str(package), "datasets": "datasets"})
        (folder / "config.yaml").write_text(text)  # JSON is YAML
        os.environ["LIBERO_CONFIG_PATH"] = str(folder)
    return package


def _check_assets(package: Path) -> None:
    """Raises a FileNotFoundError where meshes and textures are in neither place."""
    cache = Path.home() / ".cache" / "libero" / "assets"
    for folder in (package / "assets", cache):
        if all((folder / name).is_dir() for name in _ASSETS):
            return
    raise FileNotFoundError(
        f"{cache}: expected LIBERO's meshes and textures, found none. To get them, once: "
        f"hf download lerobot/libero-assets --repo-type dataset --local-dir {cache}"
    )
