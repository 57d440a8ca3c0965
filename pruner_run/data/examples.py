"""Observations that a robot could have sent, for warming a policy up and for trying a server."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pruner_spec.config import IMAGE_SIZE


def random_observation(
    metadata: Mapping[str, Any], generator: np.random.Generator, *, prompt: str
) -> dict[str, Any]:
    """An observation of random pixels and numbers, with all the cameras of the robot.

    Args:
        metadata: of a policy; its "cameras" are keys of images, its "state" keys and lengths.
        generator: what is drawn from.
        prompt: the instruction.
    """
    shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
    observation: dict[str, Any] = {
        key: generator.integers(0, 256, shape, np.uint8) for key in metadata["cameras"]
    }
    for key, length in metadata["state"].items():
        observation[key] = generator.uniform(-1.0, 1.0, length)
    return observation | {"prompt": prompt}
