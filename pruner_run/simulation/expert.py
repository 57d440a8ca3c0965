"""The scripted expert of transfer-cube: waypoints in space, inverse kinematics, joint targets.

The right arm picks the cube up, the arms meet in mid-air, and the left arm takes it over. The path
of each arm's pinch point (between its fingertips) is written down as waypoints; each arm stays in
one vertical plane through its base, the forearm never rolls, and the joints follow in closed form.
The plan depends on nothing but the cube's position: the same seed gives the same actions.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

DURATION = 8.0  # seconds

# gym-aloha's ViperX 300, metres; along and above the arm's plane
SHOULDER_HEIGHT = 0.12705
ELBOW = (0.05955, 0.3)  # from the shoulder, upper arm upright
FOREARM = 0.3
PINCH_POINT = 0.069744 + 0.135  # from the wrist

START = (0.2862, 0.3087)  # the pinch point at gym-aloha's start: along and above the table
START_PITCH = -0.1
CUBE_HEIGHT = 0.02  # of its centre, lying on the table
MEETING_POINT = np.array([0.0, 0.5, 0.25])


@dataclass(frozen=True)
class Arm:
    """Where an arm's base stands on the table, and which way along x it faces."""

    base: tuple[float, float]
    facing: float


LEFT = Arm(base=(-0.469, 0.5), facing=1.0)
RIGHT = Arm(base=(0.469, 0.5), facing=-1.0)


@dataclass(frozen=True)
class Waypoint:
    """Where one arm has to be at a time.

    Attributes:
        time: Seconds since the start of the episode.
        position: Pinch point in the world's frame, metres, [3].
        gripper: 0 closed, 1 open.
        pitch: Radians; positive tilts the fingers down.
        roll: Radians about the fingers' own direction.
    """

    time: float
    position: np.ndarray
    gripper: float
    pitch: float
    roll: float = 0.0


def start_waypoint(arm: Arm, time: float) -> Waypoint:
    """The arm at rest, as gym-aloha resets it."""
    along, above = START
    position = np.array([arm.base[0] + arm.facing * along, arm.base[1], above])
    return Waypoint(time, position, gripper=0.0, pitch=START_PITCH)


def right_waypoints(cube: Float[np.ndarray, "2"]) -> list[Waypoint]:
    """Above the cube, down, close, to the meeting point, let go, back off."""
    around = np.array([*cube, CUBE_HEIGHT])
    above = around + np.array([0.0, 0.0, 0.08])
    away = MEETING_POINT + np.array([0.12, 0.0, 0.05])
    down = np.deg2rad(60.0)
    return [
        start_waypoint(RIGHT, 0.0),
        Waypoint(1.6, above, gripper=1.0, pitch=down),
        Waypoint(2.4, around, gripper=1.0, pitch=down),
        Waypoint(3.0, around, gripper=0.0, pitch=down),
        Waypoint(4.4, MEETING_POINT, gripper=0.0, pitch=down),
        Waypoint(6.2, MEETING_POINT, gripper=0.0, pitch=down),
        Waypoint(6.6, MEETING_POINT, gripper=1.0, pitch=down),
        Waypoint(7.6, away, gripper=1.0, pitch=down),
    ]


def left_waypoints() -> list[Waypoint]:
    """Beside the meeting point, onto the cube, close, back off with it."""
    upright = np.deg2rad(90.0)  # one finger above and one below, clear of the right arm's
    beside = MEETING_POINT + np.array([-0.1, 0.0, -0.01])
    onto = MEETING_POINT + np.array([-0.01, 0.0, -0.01])
    return [
        start_waypoint(LEFT, 0.0),
        start_waypoint(LEFT, 2.4),
        Waypoint(4.2, beside, gripper=1.0, pitch=0.0, roll=upright),
        Waypoint(4.4, beside, gripper=1.0, pitch=0.0, roll=upright),
        Waypoint(5.4, onto, gripper=1.0, pitch=0.0, roll=upright),
        Waypoint(6.0, onto, gripper=0.0, pitch=0.0, roll=upright),
        Waypoint(6.6, onto, gripper=0.0, pitch=0.0, roll=upright),
        Waypoint(7.6, beside, gripper=0.0, pitch=0.0, roll=upright),
    ]


def interpolate(waypoints: list[Waypoint], time: float) -> Waypoint:
    """The waypoint at a time, eased so that the arm rests at each of those given."""
    times = [waypoint.time for waypoint in waypoints]
    after = int(np.clip(np.searchsorted(times, time, side="right"), 1, len(waypoints) - 1))
    a, b = waypoints[after - 1], waypoints[after]
    x = min((time - a.time) / (b.time - a.time), 1.0)
    x = x * x * (3.0 - 2.0 * x)
    return Waypoint(
        time=time,
        position=a.position + x * (b.position - a.position),
        gripper=a.gripper + x * (b.gripper - a.gripper),
        pitch=a.pitch + x * (b.pitch - a.pitch),
        roll=a.roll + x * (b.roll - a.roll),
    )


def joint_angles(arm: Arm, target: Waypoint) -> Float[np.ndarray, "6"]:
    """Waist, shoulder, elbow, forearm roll, wrist angle and wrist rotation, in radians.

    The waist turns the arm's plane towards the target. In it, angles are measured from the
    horizontal, positive downwards; the elbow is the upper one of the two solutions.

    Raises:
        ValueError: If the target is out of reach.
    """
    dx, dy = arm.facing * (target.position[:2] - arm.base)
    along = np.hypot(dx, dy) - PINCH_POINT * np.cos(target.pitch)
    above = target.position[2] - SHOULDER_HEIGHT + PINCH_POINT * np.sin(target.pitch)
    upper, forearm = np.hypot(*ELBOW), FOREARM
    bend = (along**2 + above**2 - upper**2 - forearm**2) / (2.0 * upper * forearm)
    if abs(bend) > 1.0:
        raise ValueError(f"out of reach of the arm at {arm.base}: {target.position}")
    bend = np.arccos(bend)
    upper_arm = np.arctan2(-above, along) - np.arctan2(
        forearm * np.sin(bend), upper + forearm * np.cos(bend)
    )
    upright = -np.arctan2(ELBOW[1], ELBOW[0])  # the upper arm's angle when the shoulder is at zero
    shoulder, elbow = upper_arm - upright, bend + upright
    wrist = target.pitch - shoulder - elbow
    return np.array([np.arctan2(dy, dx), shoulder, elbow, 0.0, wrist, target.roll])


def plan(cube: Float[np.ndarray, "2"], *, fps: int) -> Float[np.ndarray, "T 14"]:
    """Joint targets of the whole episode.

    Args:
        cube: Where the cube lies on the table: x and y in the world's frame, metres.
        fps: Actions a second.

    Returns:
        Six joint angles (radians) and a gripper (0 closed, 1 open) an arm, the left arm first.

    Raises:
        ValueError: If the cube is out of the right arm's reach.
    """
    paths = ((LEFT, left_waypoints()), (RIGHT, right_waypoints(cube)))
    actions = []
    for step in range(1, round(DURATION * fps) + 1):
        action = []
        for arm, waypoints in paths:
            target = interpolate(waypoints, step / fps)
            action += [*joint_angles(arm, target), target.gripper]
        actions.append(action)
    return np.array(actions, np.float32)
