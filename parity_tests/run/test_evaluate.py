"""`pruner eval` and `pruner record` as commands, with a simulator that simulates nothing."""

import json
import re

import numpy as np
import pytest

from parity_tests.run.servers import EchoPolicy, serving
from parity_tests.run.simulators import SPEC, Actor, Counter
from parity_tests.tolerances import tolerance
from pruner_run import cli, eval_results
from pruner_run.data.lerobot import LeRobotDataset
from pruner_run.data.video import read_frames
from pruner_run.eval_results import Results
from pruner_run.kept_bits import packed
from pruner_run.rollout import Episode


class Here(Counter):
    """The simulator in this process."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Served(EchoPolicy):
    """Its actions are all 1."""

    def prepare(self, observation):
        assert observation["image/base_0_rgb"].shape == (224, 224, 3)
        return super().prepare({"marker": 1})

    def act(self, prepared):
        bits = {"base_0_rgb": packed(np.arange(16) < 4)}
        answers = super().act(prepared)
        return [each | {"pruning": each["pruning"] | {"kept_bits": bits}} for each in answers]


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.setattr("pruner_run.evaluate.SimulatorProcess", Here)
    monkeypatch.setattr("pruner_run.record.SimulatorProcess", Here)


def said_of(arguments, capsys):
    """What is said of a command line that ends with status 2."""
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == cli.BAD_INPUT
    return " ".join(capsys.readouterr().err.split())


def results_of(*successes, env="counter", task="first", infer_ms=()):
    episodes = [
        Episode(task=task, seed=seed, success=success, steps=10 + seed, jerk=2.0,
                infer_ms=list(infer_ms), tokens_kept=[5, 7])
        for seed, success in enumerate(successes)
    ]  # fmt: skip
    return Results(env=env, policy={"name": "x"}, replan_steps=None, fps=10, episodes=episodes)


def written(folder, results):
    folder.mkdir()
    (folder / eval_results.FILE).write_text(results.to_json())
    return folder


EXPERT = ["eval", "--env", "counter", "--policy", "expert"]


def test_the_expert_from_the_command_line(tmp_path, capsys):
    output = tmp_path / "deep" / "results"
    cli.main([*EXPERT, "--episodes", "2", "--seed", "19", "--output", str(output), "--videos", "1"])
    said = capsys.readouterr().out
    assert "first, seed 19: solved, 19 steps" in said
    assert "second, seed 20: solved, 20 steps" in said
    assert re.search(r"all +4/4 +51% to 100% +19.5 +0 +– +– +–", said)
    content = json.loads((output / "results.json").read_text())
    assert content["policy"] == {"name": "expert"}
    assert content["summary"]["successes"] == content["summary"]["episodes"] == 4
    assert content["tasks"]["first"]["mean_steps"] == 19.5
    films = sorted(path.name for path in (output / "videos").iterdir())
    assert films == ["first-19.mp4", "second-19.mp4"]
    assert "expected nothing there, or --overwrite" in said_of(
        [*EXPERT, "--output", str(output)], capsys
    )
    options = ["--seeds", "21", "3", "--overwrite"]
    cli.main([*EXPERT, *options, "--output", str(output)])
    again = eval_results.read_results(output)
    assert [(e.seed, e.success) for e in again.episodes] == [(21, False), (3, True)] * 2
    assert not (output / "videos").exists()


def test_what_is_measured():
    results = results_of(True, False, True, infer_ms=(1.0, 3.0))
    assert results.summary() == {
        "successes": 2,
        "episodes": 3,
        "success_rate": 2 / 3,
        "wilson_95": list(results.share().interval),
        "mean_steps": 11.0,
        "mean_steps_of_successes": 11.0,
        "mean_jerk": 2.0,
        "infer_ms_p50": 2.0,
        "infer_ms_p99": 3.0,
        "mean_tokens_kept": 6.0,
    }
    none = results_of(False).summary()
    assert none["mean_steps_of_successes"] is none["infer_ms_p99"] is None


def test_comparing(tmp_path, capsys):
    worse = written(tmp_path / "a", results_of(*[True] * 3, *[False] * 7))
    better = written(tmp_path / "b", results_of(*[True] * 9, False))
    cli.main(["eval", "--compare", str(worse), str(better / "results.json")])
    said = " ".join(capsys.readouterr().out.split())
    assert "+60% (+17% to +81%)" in said
    assert f"succeeds more often than {worse}, by 17% to 81%." in said.replace("- ", "-")
    cli.main(["eval", "--compare", str(better), str(worse)])
    said = " ".join(capsys.readouterr().out.split())
    assert "by 17% to 81%" in said
    assert said.index(f"{better} succeeds more") > 0
    cli.main(["eval", "--compare", str(better), str(better)])
    assert "do not tell" in capsys.readouterr().out


def test_results_that_are_none_or_of_something_else(tmp_path, capsys):
    one = written(tmp_path / "one", results_of(True))
    other = written(tmp_path / "other", results_of(True, env="another"))

    def said(place):
        return said_of(["eval", "--compare", str(one), str(place)], capsys)

    assert "expected results of one environment, got counter" in said(other)
    assert "expected an evaluation's results, found none" in said(tmp_path)
    path = other / "results.json"
    for text in ("{", "[]", '{"version": 2}', '{"version": 1}'):
        path.write_text(text)
        assert "expected results of version 1, got" in said(other)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("eval", "env: expected an environment, such as aloha_sim, or --compare; got none"),
        ("eval --env counter", "policy: expected one of --policy.dir, --server, --policy expert"),
        ("eval --env counter --policy expert --server x:1", "got ['--server', '--policy expert']"),
        (f"{' '.join(EXPERT)} --episodes 0", "episodes: expected at least 1, got 0"),
        (f"{' '.join(EXPERT)} --replan_steps 0", "replan_steps: expected at least 1, got 0"),
        (f"{' '.join(EXPERT)} --seeds 1 1", "seeds: expected each once, got (1, 1)"),
        ("record --env counter --episodes 0 --output x", "episodes: expected at least 1, got 0"),
        ("record --env counter --output /", "output: expected nothing there, got /"),
    ],
)
def test_what_does_not_fit(line, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in said_of(line.split(), capsys)
    assert list(tmp_path.iterdir()) == []


def test_recording(tmp_path, capsys):
    """What is not solved is left out; episodes go on for three steps, at ten a second."""
    root = tmp_path / "deep" / "dataset"
    line = ["record", "--env", "counter", "--settle_seconds", "0.3", "--output", str(root)]
    cli.main([*line, "--seed", "2", "--episodes", "2"])
    dataset = LeRobotDataset(root)
    assert [len(episode) for episode in dataset.episodes] == [5, 6, 5, 6]
    assert [*dataset.tasks.values()] == ["do the first", "do the second"]
    np.testing.assert_array_equal(dataset.columns["observation.state"][:5, 1], range(5))
    np.testing.assert_array_equal(dataset.columns["observation.state"][5:11, 0], [3] * 6)
    np.testing.assert_array_equal(dataset.columns["action"], np.ones((22, 3)))
    assert dataset[4][f"observation.images.{SPEC.cameras[1]}"].mean() == pytest.approx(
        4, abs=tolerance("video codec", "uint8")
    )
    line[-1] = str(tmp_path / "failing")
    said = said_of([*line, "--seed", "30", "--episodes", "1"], capsys)
    assert "first: expected 1 solved episodes of the expert, got 0 of 4" in said
    assert not (tmp_path / "failing").exists()
    cli.main([*line, "--seed", "30", "--episodes", "1", "--keep_failures"])
    assert [len(episode) for episode in LeRobotDataset(line[-1]).episodes] == [20, 20]


def test_a_policy_in_this_process(tmp_path, monkeypatch, capsys):
    """The options reach `policy.load`, and its answers are counted."""
    given = {}

    def load(place, config, backend, **options):
        given.update(options, place=place, config=config, backend=backend)
        return Actor(config="x", secret="y")

    monkeypatch.setattr("pruner_run.policy.load", load)
    line = "eval --env counter --policy.dir place --policy.config name --backend torch --seeds 3"
    options = "--token_prune_keep_tokens 9 --replan_steps 2 --videos 1 --output"
    cli.main([*line.split(), *options.split(), str(tmp_path / "out")])
    assert (given["place"], given["config"], given["backend"]) == ("place", "name", "torch")
    assert (given["keep_tokens"], given["pruning"]) == (9, None)
    results = eval_results.read_results(tmp_path / "out")
    assert results.policy == {"name": "place", "config": "x"}
    assert [episode.tokens_kept for episode in results.episodes] == [[5, 6], [7, 8]]


def test_a_server_over_the_websocket(tmp_path):
    """It says which patches it kept, so that they are lit as in this process."""
    with serving(Served()) as server:
        line = ["eval", "--env", "counter", "--server", server.address, "--episodes", "2"]
        cli.main([*line, "--videos", "1", "--output", str(tmp_path / "out")])
        results = eval_results.read_results(tmp_path / "out")
    [start] = read_frames(tmp_path / "out/videos/first-0.mp4", start=0, count=1, fps=SPEC.fps)
    outlined = start[:336].max(axis=-1) > 128  # the images themselves are black
    assert outlined[84:90, :336].any()  # below the first of four rows
    outlined[80:95, :345] = False
    assert not outlined[:336].any()
    assert [episode.success for episode in results.episodes] == [True] * 4
    assert results.policy["name"] == server.address
    assert all(ms > 0 for episode in results.episodes for ms in episode.infer_ms)
