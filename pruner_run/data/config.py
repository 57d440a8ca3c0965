"""Where a run's data comes from, and what becomes of it before the model."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from pruner_run.data.robots import ROBOTS, Robot, RobotName
from pruner_spec.config import Pi0Config

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A dataset, the robot it is of, and how its numbers are read. Names are openpi's.

    Attributes:
        repo_id: the folder of a LeRobot dataset, or its name on the Hub, "owner/name".
        fake: generated samples instead, which need no dataset and no statistics.
        assets_dir: where the statistics are read from; the config's own place if not given. That of
            another checkpoint keeps the statistics which its weights were trained with.
        asset_id: the statistics' folder in there; if not given, the dataset's name.
        robot: whose observations the dataset holds. "plain" has the model's own cameras.
        repack: the robot's keys -> the dataset's; openpi's for the robot if not given.
        default_prompt: the instruction where the data has none.
        prompt_from_task: the instruction is the dataset's task.
        adapt_to_pi: of ALOHA, converts joints and grippers to those that the base models know.
        use_delta_joint_actions: of ALOHA, actions of joints are relative to the state.
        extra_delta_transform: of LIBERO, the same once more, as some checkpoints of π0 have it.
        delta_action_mask: which numbers of an action are relative to the state, in place of those.
        action_sequence_keys: the dataset's key that is read as chunks of actions, in place of the
            one that `repack` has. There is one.
        use_quantile_norm: normalises by quantiles, not by mean and deviation; as the model is π0.5
            if not given.
    """

    repo_id: str | None = None
    fake: bool = False
    assets_dir: str | None = None
    asset_id: str | None = None
    robot: RobotName = "plain"
    repack: Mapping[str, str] | None = None
    default_prompt: str | None = None
    prompt_from_task: bool = False
    adapt_to_pi: bool = True
    use_delta_joint_actions: bool = True
    extra_delta_transform: bool = False
    delta_action_mask: tuple[bool, ...] | None = None
    action_sequence_keys: tuple[str, ...] | None = None
    use_quantile_norm: bool | None = None

    def __post_init__(self) -> None:
        if self.robot not in ROBOTS:
            raise ValueError(f"robot: expected one of {list(ROBOTS)}, got {self.robot!r}")
        if self.extra_delta_transform and self.robot != "libero":
            raise ValueError(
                "extra_delta_transform: expected the robot 'libero', got "
                f"{self.robot!r}; delta_action_mask is for any"
            )
        if self.action_sequence_keys is not None and len(self.action_sequence_keys) != 1:
            raise ValueError(
                f"action_sequence_keys: expected one key, got {self.action_sequence_keys}"
            )

    @property
    def of_robot(self) -> Robot:
        """The robot's row."""
        return ROBOTS[self.robot]

    @property
    def sources(self) -> Mapping[str, str]:
        """The robot's keys -> the dataset's."""
        sources = self.of_robot.repack if self.repack is None else self.repack
        if self.action_sequence_keys is None:
            return sources
        return {**sources, "actions": self.action_sequence_keys[0]}

    @property
    def delta_mask(self) -> tuple[bool, ...] | None:
        """Which numbers of an action are relative to the state; None for none."""
        if self.delta_action_mask is not None:
            return tuple(self.delta_action_mask)
        relative = {"aloha": self.use_delta_joint_actions, "libero": self.extra_delta_transform}
        return self.of_robot.delta if relative.get(self.robot, False) else None

    @property
    def stats_id(self) -> str:
        """The folder of the statistics: `asset_id`, or the dataset's name.

        Raises:
            ValueError: neither is given.
        """
        if self.asset_id is not None:
            return self.asset_id
        if self.repo_id is None:
            raise ValueError(
                "repo_id: expected a dataset's folder or its name on the Hub, got none"
            )
        return (
            self.repo_id if _HUB_ID.fullmatch(self.repo_id) else Path(self.repo_id).resolve().name
        )

    def uses_quantiles(self, model: Pi0Config) -> bool:
        """Whether quantiles normalise the numbers of this model."""
        return model.pi05 if self.use_quantile_norm is None else self.use_quantile_norm
