"""The scripted expert and the recorder; what needs the simulator is marked `sim`."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from parity_tests.tolerances import tolerance
from pruner_run import cli
from pruner_run.assets import DEMO_EPISODE
from pruner_run.data.lerobot import LeRobotDataset
from pruner_run.rollout import run_episode
from pruner_run.simulation import aloha, expert
from pruner_run.simulation import environment as environments

needs_simulator = pytest.mark.skipif(
    importlib.util.find_spec("gym_aloha") is None, reason="gym-aloha is not installed"
)


def test_joint_angles_at_gym_alohas_start():
    for arm in (expert.LEFT, expert.RIGHT):
        joints = expert.joint_angles(arm, expert.start_waypoint(arm, 0.0))
        np.testing.assert_array_equal(joints.round(3), [0.0, -0.96, 1.16, 0.0, -0.3, 0.0])


def test_out_of_reach():
    target = expert.Waypoint(0.0, np.array([0.5, 0.5, 0.2]), gripper=0.0, pitch=0.0)
    with pytest.raises(ValueError, match="out of reach of the arm at"):
        expert.joint_angles(expert.LEFT, target)


def test_the_plan_is_smooth_and_ends_open_right_closed_left():
    actions = expert.plan(np.array([0.1, 0.5]), fps=25)
    assert actions.shape == (200, 14)
    assert actions.dtype == np.float32
    assert np.abs(np.diff(actions, axis=0)).max() < 0.2
    assert (actions[-1, 6], actions[-1, 13]) == (0.0, 1.0)


def test_the_shipped_actions_are_the_plans():
    """The cube's place is seed 0's, as gym-aloha samples it."""
    rng = np.random.RandomState(0)
    cube = rng.uniform([0.0, 0.4, 0.05], [0.2, 0.6, 0.05])[:2]
    shipped = LeRobotDataset(DEMO_EPISODE).columns["action"]
    np.testing.assert_array_equal(expert.plan(cube, fps=25).round(5), shipped.round(5))


def test_without_the_simulator_it_says_what_to_install():
    code = (
        "import sys; sys.modules['gym_aloha'] = None\n"
        "from pruner_run.simulation.aloha import TransferCube\n"
        "try: TransferCube()\n"
        "except ImportError as error: assert 'pip install gym-aloha' in str(error), error\n"
        "else: raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.sim
@needs_simulator
def test_fps_has_to_divide_the_simulations():
    with pytest.raises(ValueError, match="fps must divide 50, got 30"):
        aloha.TransferCube(fps=30)


@pytest.mark.sim
@needs_simulator
def test_the_joints_bring_the_pinch_point_where_it_should_be():
    """Against the simulator's own forward kinematics."""
    environment = aloha.TransferCube()
    environment.reset(0)
    physics = environment._environment.physics
    for arm, name, first in ((expert.LEFT, "left", 0), (expert.RIGHT, "right", 8)):
        position = np.array([arm.base[0] + arm.facing * 0.4, 0.55, 0.2])
        target = expert.Waypoint(0.0, position, gripper=0.0, pitch=0.7, roll=0.4)
        physics.data.qpos[first : first + 6] = expert.joint_angles(arm, target)
        physics.forward()
        link = f"vx300s_{name}/gripper_link"
        rotation = physics.named.data.xmat[link].reshape(3, 3)
        pinch = physics.named.data.xpos[link] + 0.135 * rotation[:, 0]
        np.testing.assert_allclose(
            pinch, position, rtol=0, atol=tolerance("inverse kinematics", "float64")
        )


@pytest.mark.sim
@needs_simulator
@pytest.mark.parametrize("seed", [1, 2])
def test_the_expert_succeeds(seed):
    environment = aloha.TransferCube(fps=25)
    environment.reset(seed)
    rewards = [environment.step(a) for a in expert.plan(environment.cube[:2], fps=25)]
    assert rewards[0] == 0
    assert rewards[-1] == aloha.SUCCESS


@pytest.mark.sim
@needs_simulator
def test_recording_again_gives_the_shipped_episode(tmp_path):
    root = tmp_path / "again"
    line = "record --env aloha_sim --episodes 1 --settle_seconds 8 --output"
    cli.main([*line.split(), str(root)])
    again, shipped = LeRobotDataset(root), LeRobotDataset(DEMO_EPISODE)
    for key, values in shipped.columns.items():
        np.testing.assert_array_equal(again.columns[key], values, err_msg=key)
    assert again.tasks == shipped.tasks


@pytest.mark.sim
@needs_simulator
def test_replaying_the_shipped_actions_gives_the_shipped_states_and_images():
    shipped = LeRobotDataset(DEMO_EPISODE)
    environment = aloha.TransferCube(fps=25)
    environment.reset(0)
    reward = 0
    for index, action in enumerate(shipped.columns["action"]):
        state = shipped.columns["observation.state"][index]
        np.testing.assert_array_equal(environment.state, state)
        if index % 60 == 0:
            frame = shipped[index]
            for camera, image in environment.render().items():
                seen = frame[f"observation.images.{camera}"]
                assert np.abs(image.astype(float) - seen).mean() < tolerance("video codec", "uint8")
        reward = environment.step(action)
    assert reward == aloha.SUCCESS


@pytest.mark.parametrize(
    ("rewards", "solved_at"),
    [
        ("4" * 20, range(12, 20)),
        ("4" * 12 + "0" * 8, ()),
        ("4" * 15 + "0" + "4" * 4, (12, 13, 14, 16, 17, 18, 19)),  # the contact flickers
        ("4" * 6 + "00" + "4" * 12, ()),
        ("0" + "4" * 19, range(13, 20)),
    ],
)
def test_what_is_a_held_cube(rewards, solved_at, monkeypatch):
    class Cube:
        cube = np.array([0.1, 0.5, 0.02])
        instruction, state = "", np.zeros(14)

        def __init__(self, **_):
            pass

        def reset(self, seed):
            self.rewards = map(int, rewards)

        def render(self):
            return {}

        def step(self, action):
            return next(self.rewards)

    monkeypatch.setattr("pruner_run.simulation.aloha_sim.TransferCube", Cube)
    environment = environments.make("aloha_sim")
    for seed in range(2):
        environment.reset("transfer_cube", seed)
        steps = [environment.step(None, observe=False).success for _ in rewards]
        assert [number for number, solved in enumerate(steps) if solved] == [*solved_at]


@pytest.mark.sim
@needs_simulator
def test_the_cube_has_to_be_held():
    """For half a second, twelve actions and a half."""
    environment = environments.make("aloha_sim")
    environment.reset("transfer_cube", 0)
    for action in expert.plan(environment._cube.cube[:2], fps=25):
        step = environment.step(action, observe=False)
        if step.success:
            break
    assert [*environment._held] == [True] * 13
    assert environment.step(action).observation.keys() >= {"image/base_0_rgb", "state", "prompt"}


@pytest.mark.sim
@pytest.mark.skipif(
    importlib.util.find_spec("metaworld") is None, reason="Meta-World is not installed"
)
def test_meta_worlds_expert_and_its_seeds():
    environment = environments.make("metaworld:door-open-v3,reach-v3")
    for task in environment.spec.tasks:
        episodes = [run_episode(environment, None, task, seed) for seed in (0, 0, 1)]
        assert all(episode.success for episode in episodes)
        assert episodes[0] == episodes[1] != episodes[2]
    assert environment.reset("reach-v3", 0)["prompt"] == "reach"
    with pytest.raises(ValueError, match="expected tasks of Meta-World"):
        environments.make("metaworld:dance-v3")
    environment.close()


def test_environments_that_are_none():
    for name in ("aloha", "libero:all", "aloha_sim:fast"):
        with pytest.raises(ValueError, match="env: expected"):
            environments.make(name)
