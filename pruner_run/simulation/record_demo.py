"""Records one episode of the scripted expert as a LeRobot dataset.

    python -m pruner_run.simulation.record_demo --output DIR --seed N

The shipped `pruner_run/assets/aloha_transfer_cube` is seed 0. It needs the extra `sim`: gym-aloha
0.1.5 (which brings dm-control 1.0.41 and mujoco 3.8.1, the versions it was recorded with) and EGL
for rendering without a screen. The same seed gives the same states and actions.
"""

import argparse
from pathlib import Path

import numpy as np

from pruner_run.data.lerobot_features import Feature
from pruner_run.data.lerobot_writer import write_dataset
from pruner_run.data.video import Encoding
from pruner_run.simulation import aloha, expert

FPS = 25
IMAGE_SIZE = 224
ENCODING = Encoding(gop=10)  # smaller than LeRobot's two frames, and still read in milliseconds
FEATURES = {
    "observation.state": Feature("float32", (14,), aloha.STATE_NAMES),
    "action": Feature("float32", (14,), aloha.STATE_NAMES),
    **{
        f"observation.images.{camera}": Feature("video", (IMAGE_SIZE, IMAGE_SIZE, 3))
        for camera in aloha.CAMERAS
    },
}


def record_episode(environment: aloha.TransferCube, seed: int) -> dict:
    """Runs the expert once.

    Each frame is what was seen and measured before its action.

    Returns:
        The episode as `write_dataset` takes it.

    Raises:
        RuntimeError: If the expert failed at the task.
    """
    environment.reset(seed)
    actions = expert.plan(environment.cube[:2], fps=FPS)
    frames: dict[str, list] = {key: [] for key in FEATURES if key != "action"}
    reward = 0
    for action in actions:
        frames["observation.state"].append(environment.state)
        for camera, image in environment.render().items():
            frames[f"observation.images.{camera}"].append(image)
        reward = environment.step(action)
    if reward != aloha.SUCCESS:
        raise RuntimeError(f"seed {seed}: expected reward {aloha.SUCCESS} at the end, got {reward}")
    episode = {key: np.stack(values) for key, values in frames.items()}
    return episode | {"action": actions, "task": environment.instruction}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Record one scripted transfer-cube episode.")
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--seed", type=int, default=0, help="decides where the cube lies")
    arguments = parser.parse_args()
    environment = aloha.TransferCube(fps=FPS, image_size=IMAGE_SIZE)
    write_dataset(
        arguments.output,
        [record_episode(environment, arguments.seed)],
        fps=FPS,
        features=FEATURES,
        robot_type="aloha",
        encoding=ENCODING,
    )


if __name__ == "__main__":
    main()
