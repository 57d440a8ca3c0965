"""Robots that openpi knows: where their observations are, and how they become the model's.

A robot is a row of `ROBOTS`. Keys are paths with "/": a client's {"images": {"cam_high": ...}} and
the key "images/cam_high" are the same.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np
from jaxtyping import Float

from pruner_spec.config import CAMERAS

RobotName = Literal["plain", "aloha", "libero", "droid"]

BASE, LEFT_WRIST, RIGHT_WRIST = CAMERAS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Robot:
    """What a robot shows to the model, and how many numbers of an action it takes.

    Attributes:
        cameras: the model's camera -> its key. A camera that is not here is black and masked.
        optional: those of `cameras` that an observation may lack.
        spare: keys of images that may be there but that the model does not see.
        state: keys of the state's parts, in order.
        state_dims: how many numbers each part has; None for as many as there are statistics of.
        action_dim: numbers of an action; None for as many as there are statistics of.
        repack: those keys -> a dataset's, by openpi's conventions.
        delta: which numbers of an action are relative to the state, if any are.
    """

    cameras: Mapping[str, str]
    optional: frozenset[str] = frozenset()
    spare: frozenset[str] = frozenset()
    state: tuple[str, ...] = ("state",)
    state_dims: tuple[int, ...] | None = None
    action_dim: int | None = None
    repack: Mapping[str, str]
    delta: tuple[bool, ...] | None = None


def make_bool_mask(*lengths: int) -> tuple[bool, ...]:
    """As many times True as a length says, or False for a negative one: (2, -1) is (1, 1, 0)."""
    return tuple(length > 0 for length in lengths for _ in range(abs(length)))


ROBOTS: Mapping[RobotName, Robot] = {
    "plain": Robot(
        cameras={camera: f"image/{camera}" for camera in CAMERAS},
        optional=frozenset(CAMERAS),
        repack={
            **{f"image/{camera}": f"observation.images.{camera}" for camera in CAMERAS},
            "state": "observation.state",
            "actions": "action",
        },
    ),
    "aloha": Robot(
        cameras={
            BASE: "images/cam_high",
            LEFT_WRIST: "images/cam_left_wrist",
            RIGHT_WRIST: "images/cam_right_wrist",
        },
        optional=frozenset({LEFT_WRIST, RIGHT_WRIST}),
        spare=frozenset({"images/cam_low"}),
        state_dims=(14,),
        action_dim=14,
        repack={
            "images/cam_high": "observation.images.top",
            "state": "observation.state",
            "actions": "action",
        },
        delta=make_bool_mask(6, -1, 6, -1),
    ),
    "libero": Robot(
        cameras={BASE: "observation/image", LEFT_WRIST: "observation/wrist_image"},
        state=("observation/state",),
        state_dims=(8,),
        action_dim=7,
        repack={
            "observation/image": "image",
            "observation/wrist_image": "wrist_image",
            "observation/state": "state",
            "actions": "actions",
        },
        delta=make_bool_mask(6, -1),
    ),
    "droid": Robot(
        cameras={
            BASE: "observation/exterior_image_1_left",
            LEFT_WRIST: "observation/wrist_image_left",
        },
        spare=frozenset({"observation/exterior_image_2_left"}),
        state=("observation/joint_position", "observation/gripper_position"),
        state_dims=(7, 1),
        action_dim=8,
        repack={
            "observation/exterior_image_1_left": "exterior_image_1_left",
            "observation/wrist_image_left": "wrist_image_left",
            "observation/joint_position": "joint_position",
            "observation/gripper_position": "gripper_position",
            "actions": "actions",
        },
    ),
}


# Physical Intelligence's ALOHA, which the base models know, against the standard one: joints that
# turn the other way, and grippers as angles.
ALOHA_DIM = 14
_SIGNS = np.array([1, -1, -1, 1, 1, 1, 1] * 2, np.float64)
_GRIPPERS = [6, 13]

_PUPPET_POSITION = (0.01844, 0.05800)  # metres, closed and open
_PUPPET_JOINT = (-0.6213, 1.4910)  # radians, closed and open
_ARM_LENGTH, _HORN_RADIUS = 0.036, 0.022  # of the gripper's crank, metres
_ANGLES = (0.5476, 1.6296)  # radians that are 0 and 1 to the base models


def aloha_state_to_pi(state: Float[np.ndarray, "*batch 14"]) -> Float[np.ndarray, "*batch 14"]:
    """A state, whose grippers are shares of the jaws' travel, with shares of the motor's angle."""
    state = state * _SIGNS
    closed, opened = _PUPPET_POSITION
    position = state[..., _GRIPPERS] * (opened - closed) + closed
    sine = (position**2 + _HORN_RADIUS**2 - _ARM_LENGTH**2) / (2 * _HORN_RADIUS * position)
    angle = np.arcsin(np.clip(sine, -1.0, 1.0))
    state[..., _GRIPPERS] = (angle - _ANGLES[0]) / (_ANGLES[1] - _ANGLES[0])
    return state


def aloha_actions_to_pi(actions: Float[np.ndarray, "*batch 14"]) -> Float[np.ndarray, "*batch 14"]:
    """Actions, whose grippers are shares of the motor's turn, with angles from the base's zero."""
    actions = actions * _SIGNS
    closed, opened = _PUPPET_JOINT
    angle = actions[..., _GRIPPERS] * (opened - closed) + closed
    actions[..., _GRIPPERS] = angle - _ANGLES[0]
    return actions


def aloha_actions_from_pi(
    actions: Float[np.ndarray, "*batch 14"],
) -> Float[np.ndarray, "*batch 14"]:
    """The inverse of `aloha_actions_to_pi`."""
    actions = actions * _SIGNS
    closed, opened = _PUPPET_JOINT
    angle = actions[..., _GRIPPERS] + _ANGLES[0]
    actions[..., _GRIPPERS] = (angle - closed) / (opened - closed)
    return actions
