"""gym-aloha's transfer-cube with three cameras: the robot, the physics and the renders.

Two things differ from `gym_aloha.AlohaEnv`. It renders three 640x480 images at every one of its 50
steps a second, wanted or not; here images are made by `render` only. And shadows and multisampling
are off, which makes software rendering about ten times faster. Data and evaluation have to see the
same renders, so both use this class.

The simulator is imported by the constructor, never by this module.
"""

import os
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

SIMULATION_FPS = 50
ARMS = ("left", "right")
JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
STATE_NAMES = tuple(f"{arm}_{joint}" for arm in ARMS for joint in JOINTS)
CAMERAS = {  # the model's name -> the name in gym-aloha's scene
    "base_0_rgb": "top",
    "left_wrist_0_rgb": "left_wrist",
    "right_wrist_0_rgb": "right_wrist",
}
SUCCESS = 4  # the reward once the left arm alone, or with the right one, holds the cube in the air


class TransferCube:
    """Transfer-cube at a control rate that divides the simulation's 50 steps a second.

    An action is held for `50 / fps` steps of the simulation.
    """

    instruction = "transfer the red cube from the right arm to the left arm"

    def __init__(self, *, fps: int = 50, image_size: int = 224):
        """Builds the physics; `reset` has to be called before anything else.

        Args:
            fps: Actions a second.
            image_size: Height and width of the renders in pixels.

        Raises:
            ImportError: If gym-aloha is not installed.
            ValueError: If `fps` does not divide 50.
        """
        if SIMULATION_FPS % fps:
            raise ValueError(f"fps must divide {SIMULATION_FPS}, got {fps}")
        self._hold = SIMULATION_FPS // fps
        self._image_size = image_size
        self._environment = _make_environment()

    def reset(self, seed: int) -> None:
        """Puts the arms at their start and the cube where the seed says."""
        from gym_aloha.tasks import sim
        from gym_aloha.utils import sample_box_pose

        sim.BOX_POSE[0] = sample_box_pose(seed)
        self._environment.reset()

    def step(self, action: Float[np.ndarray, "14"]) -> int:
        """Holds the joint targets for one control step; returns the reward (4 is success)."""
        if (shape := np.shape(action)) != (len(STATE_NAMES),):
            raise ValueError(f"action: expected shape ({len(STATE_NAMES)},), got {shape}")
        for _ in range(self._hold):
            reward = self._environment.step(action).reward
        return reward

    @property
    def state(self) -> Float[np.ndarray, "14"]:
        """Joint angles (radians) and grippers (0 closed, 1 open), the left arm first."""
        qpos = self._environment.task.get_qpos(self._environment.physics)
        return qpos.astype(np.float32)

    @property
    def cube(self) -> Float[np.ndarray, "3"]:
        """Centre of the cube in the world's frame, metres."""
        return self._environment.physics.named.data.xpos["box"].copy()

    def render(self) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
        """One image a camera, under the model's names for them."""
        render, size = self._environment.physics.render, self._image_size
        return {
            name: render(height=size, width=size, camera_id=camera)
            for name, camera in CAMERAS.items()
        }


def _make_environment() -> Any:
    """A `dm_control` environment of transfer-cube without image observations."""
    os.environ.setdefault("MUJOCO_GL", "egl")  # read when dm_control is first imported
    try:
        from dm_control import mujoco
        from dm_control.rl import control
        from gym_aloha import constants
        from gym_aloha.tasks import sim
    except ImportError as error:
        raise ImportError("the simulator needs gym-aloha: pip install gym-aloha==0.1.5") from error

    class Task(sim.TransferCubeTask):
        def get_observation(self, physics):
            return {}

    scene = constants.ASSETS_DIR / "bimanual_viperx_transfer_cube.xml"
    physics = mujoco.Physics.from_xml_path(str(scene))
    physics.model.vis.quality.shadowsize = 0
    physics.model.vis.quality.offsamples = 0
    return control.Environment(physics, Task(), control_timestep=1.0 / SIMULATION_FPS)
