"""Episodes of policies in a simulator that simulates nothing; the process that it runs in."""

import dataclasses

import numpy as np
import pytest

from parity_tests.run import simulators
from parity_tests.run.simulators import SPEC, Actor, Counter
from parity_tests.tolerances import tolerance
from pruner_run.data.video import read_frames
from pruner_run.rollout import jerk, observation_of, run_episode, run_episodes
from pruner_run.rollout_video import Film
from pruner_run.simulation import process
from pruner_run.simulation.process import SimulatorProcess


def test_jerk_is_the_third_derivative():
    """Of t³ it is 6, of a quadratic 0, in the units of seconds whatever the rate."""
    for fps in (10, 80):
        t = np.arange(32)[:, None] / fps
        cubic = np.concatenate([t**3, 2 * t**3], axis=1)
        difference = jerk(cubic, fps) - np.sqrt((6**2 + 12**2) / 2)
        assert abs(difference) < tolerance("statistics", "float64")
        assert jerk(3 * t**2 - t, fps) < tolerance("statistics", "float64")
    assert jerk(np.zeros((3, 2)), 10) is None


def test_an_episode_ends_with_success():
    environment, actor = Counter(), Actor(horizon=4)
    episode = run_episode(environment, actor, "first", seed=5)
    # the first action is 0, which does not count, so that the fifth that does is the sixth
    assert (episode.success, episode.steps) == (True, 6)
    assert [observation["state"][1] for observation in actor.seen] == [0, 4]
    assert environment.observed == [0, 4]  # rendered when the policy looks, and else not
    assert episode.tokens_kept == [5, 6]
    assert len(episode.infer_ms) == 2
    assert (episode.task, episode.seed) == ("first", 5)


def test_an_episode_that_takes_too_long_has_failed():
    environment, actor = Counter(), Actor(first=-1.0)
    episode = run_episode(environment, actor, "first", seed=1)
    assert (episode.success, episode.steps) == (False, SPEC.max_steps)
    assert environment.observed == [0, 4, 8, 12, 16]  # not after the last


@pytest.mark.parametrize(("replan_steps", "asked_at"), [(1, [0, 1, 2, 3]), (3, [0, 3]), (4, [0])])
def test_replanning(replan_steps, asked_at):
    actor = Actor(horizon=4)
    episode = run_episode(Counter(), actor, "first", seed=3, replan_steps=replan_steps)
    assert [observation["state"][1] for observation in actor.seen] == asked_at
    assert episode.success


def test_the_expert_acts_without_being_shown_anything():
    environment = Counter()
    episode = run_episode(environment, None, "second", seed=6)
    assert (episode.success, episode.steps, episode.jerk) == (True, 6, 0.0)
    assert environment.observed == [0]
    assert episode.infer_ms == episode.tokens_kept == []


@pytest.mark.parametrize(
    ("actor", "replan_steps", "said"),
    [
        (Actor(dims=2), None, r"counter: expected actions of shape \[H, 3\], got \[4, 2\]"),
        (Actor(horizon=4), 5, "replan_steps: expected at most the 4 actions of a chunk, got 5"),
        (Actor(first=np.nan), None, "counter: expected a finite action, got"),
        (Actor(robot="droid"), None, "robot: expected one whose state is one vector, got 'droid'"),
    ],
)
def test_policies_that_do_not_fit(actor, replan_steps, said):
    with pytest.raises(ValueError, match=said):
        run_episode(Counter(), actor, "first", seed=1, replan_steps=replan_steps)


def test_observations_for_each_robot():
    given = Counter().reset("first", 3)
    plain = observation_of(given, "plain")
    assert plain.keys() == given.keys()
    aloha = observation_of(given, "aloha")
    assert aloha.keys() == {"images", "state", "prompt"}
    assert aloha["images"].keys() == {"cam_high", "cam_left_wrist"}
    assert aloha["images"]["cam_high"].shape == (3, 224, 224)
    libero = observation_of(given, "libero")
    wanted = {"observation/image", "observation/wrist_image", "observation/state", "prompt"}
    assert libero.keys() == wanted
    assert libero["prompt"] == "do the first"
    actor = Actor(robot="libero")
    run_episode(Counter(), actor, "first", seed=1)
    assert actor.seen[0].keys() == wanted


def test_every_task_with_every_seed():
    counter, actor = Counter(), Actor()
    run = list(
        run_episodes(counter, lambda task, seed: run_episode(counter, actor, task, seed), [4, 9])
    )
    assert [(e.task, e.seed) for e in run] == [
        ("first", 4), ("first", 9), ("second", 4), ("second", 9)
    ]  # fmt: skip


def test_a_simulator_that_fails_is_started_again_once_an_episode():
    counter, failures = Counter(), [1, 1, 0, 1, 0]

    def run_one(task, seed):
        if failures and failures.pop():
            raise ChildProcessError("gone")
        return run_episode(counter, None, task, seed)

    assert len(list(run_episodes(counter, run_one, [1]))) == 2
    assert counter.restarts == 1
    failures[:] = [1, 1]
    with pytest.raises(ChildProcessError, match="gone"):
        list(run_episodes(counter, run_one, [1]))


def test_a_film_has_a_frame_a_step_and_the_start(tmp_path):
    with Film(tmp_path / "film.mp4", SPEC) as film:
        episode = run_episode(Counter(), Actor(), "first", seed=3, camera=film)
    frames = read_frames(tmp_path / "film.mp4", start=0, count=episode.steps + 1, fps=SPEC.fps)
    base, wrist = np.split(frames[:, :336], 2, axis=2)
    outlined = base[0].max(axis=-1) > 128  # the images themselves are black
    assert outlined.any()
    assert not outlined[30:].any()  # the first 5 patches are in the first row
    assert not (wrist[0] > 128).any()
    with pytest.raises(ValueError, match="expected 1 frames"):
        read_frames(tmp_path / "film.mp4", start=(episode.steps + 1) / SPEC.fps, count=1, fps=10)


def test_a_film_of_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), Film(tmp_path / "film.mp4", SPEC):
        _ = 1 / 0


def test_a_simulator_in_its_own_process():
    """The same episodes as here; killed, it says so, and is there again after a restart."""
    with SimulatorProcess("mortal", simulators.Mortal) as simulator:
        assert simulator.spec == SPEC
        here = run_episode(Counter(), Actor(), "first", seed=5)
        there = run_episode(simulator, Actor(), "first", seed=5)
        assert dataclasses.replace(there, infer_ms=here.infer_ms) == here
        killed = "mortal: the simulator's process ended with SIGKILL"
        with pytest.raises(ChildProcessError, match=killed):
            run_episode(simulator, Actor(), "first", seed=7)
        with pytest.raises(ChildProcessError, match=killed):
            simulator.reset("first", 1)
        simulator.restart()
        assert run_episode(simulator, Actor(), "second", seed=2).success


def test_what_a_process_says_of_its_end(capfd, monkeypatch):
    with SimulatorProcess("faulty", simulators.Faulty) as simulator:
        simulator.reset("first", 1)
        said = "faulty: RuntimeError: the physics have exploded"
        with pytest.raises(ChildProcessError, match=said):
            simulator.step(None)
    assert "Traceback" in capfd.readouterr().err
    with pytest.raises(ValueError, match=r"^the simulator needs a package: pip install it$"):
        SimulatorProcess("x", simulators.missing)
    with pytest.raises(ValueError, match=r"^loaded: \[\]$"):
        SimulatorProcess("x", simulators.loaded)
    monkeypatch.setattr(process, "STEP_SECONDS", 0.1)
    silent = pytest.raises(ChildProcessError, match=r"silent: .* did not answer in 0.1 s")
    with SimulatorProcess("silent", simulators.Silent) as simulator, silent:
        simulator.step(None)
