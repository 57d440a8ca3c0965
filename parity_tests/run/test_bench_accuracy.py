"""Actions against a float32 reference: who is asked what, and what is made of the answers."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from parity_tests.harness import BACKENDS, error
from parity_tests.run.benches import ACCURACY, options, pretend
from parity_tests.tolerances import tolerance
from pruner_run import backend as backends
from pruner_run import bench, bench_accuracy, bench_cases
from pruner_run.bench_accuracy import SAMPLES, Answer
from pruner_run.bench_cases import Case, Setup
from pruner_run.bench_results import Closeness, read

pytestmark = pytest.mark.usefixtures("compile_fast")

ROUNDING = tolerance("statistics", "float64")
SETUP = Setup(config="tiny", dtype="float32")
CASE = Case(keep="24", prompt=20, batch=2, cameras=2, num_steps=2)


@pytest.mark.parametrize("name", BACKENDS)
def test_patches_that_were_chosen_elsewhere(name):
    """With its own a model gives its own actions; with others it does not, and says its own."""
    observation, noise = bench_cases.inputs(CASE, SETUP)
    model = backends.load(name).model(SETUP.model_config(CASE), None)
    actions = model.sample_actions(observation, noise, 2)
    own = model.kept()
    same = model.sample_kept(observation, noise, 2, own)
    np.testing.assert_array_equal(same, actions)
    others = {camera: np.roll(kept, 1, axis=1) for camera, kept in own.items()}
    found = model.sample_kept(observation, noise, 2, others)
    assert error(found, actions) > tolerance("same computation", "float32")
    for camera, kept in model.kept().items():
        np.testing.assert_array_equal(kept, own[camera])


@pytest.mark.parametrize("name", BACKENDS)
def test_the_reference_has_the_same_numbers(name):
    """A model of float32 is its own reference; one of bfloat16 is not far from it."""
    observation, noise = bench_cases.inputs(CASE, SETUP)
    found = {}
    for dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(SETUP, dtype=dtype).model_config(CASE)
        model = backends.load(name).model(config, None)
        actions = model.sample_actions(observation, noise, 2)
        kept = model.kept()
        found[dtype] = actions, model.widened().sample_kept(observation, noise, 2, kept)
    assert error(*found["float32"]) < tolerance("same computation", "float32")
    assert tolerance("same computation", "float32") < error(*found["bfloat16"])
    closeness = bench_accuracy.closeness(*([Answer(each, None)] for each in found["bfloat16"]))
    assert min(closeness.cosine) > 0.999


class FakeModel:
    """Answers with the path's number, on the right patches; counts those that there are."""

    alive = 0

    def __init__(self, value: float, fails_at: int = 0) -> None:
        self.value, self.fails_at = value, fails_at
        self.given: list = []
        type(self).alive += 1

    def __del__(self) -> None:
        type(self).alive -= 1

    def sample_kept(self, observation, noise, num_steps, kept):
        if len(noise) == self.fails_at:
            raise MemoryError("too much")
        self.given.append(kept)
        return np.full_like(noise, self.value)

    def kept(self):
        return {camera: each ^ True for camera, each in self.given[-1].items()}

    def widened(self):
        return FakeModel(2.0, self.fails_at)


class FakeBackend:
    def __init__(self, **options: Any) -> None:
        self.options = options

    def model(self, config, weights, *, fast=False):
        assert FakeModel.alive == 0  # one at a time
        return FakeModel(1.875, **self.options)


def measured(case, value):
    kept = {"base_0_rgb": np.arange(256)[None].repeat(case.batch, 0) < 128}
    shape = (case.batch, case.horizon, 32)
    return [Answer(np.full(shape, value), kept) for _ in range(-(-SAMPLES // case.batch))]


def events(backend: Any, cases, answers, *, is_plain=False) -> list[Any]:
    return list(bench_accuracy.events(backend, SETUP, cases, answers, is_plain=is_plain))


def test_who_is_asked_what():
    """Cases of one config share a model, and a case that fails costs itself alone."""
    cases = [Case(keep="64"), Case(keep="24"), Case(keep="64", batch=4)]
    answers = {place: measured(case, 1.75) for place, case in enumerate(cases)}
    found = events(FakeBackend(fails_at=4), cases, answers)
    assert [(event["event"], event["place"]) for event in found] == [
        ("accuracy", 0),
        ("unjudged", 2),
        ("accuracy", 1),
    ]
    assert found[1]["error"] == "MemoryError: too much"
    path, plain = (found[0]["accuracy"][way] for way in ("path", "plain"))
    assert path["distance"] == pytest.approx([0.125] * SAMPLES, rel=ROUNDING)
    assert plain["distance"] == pytest.approx([0.0625] * SAMPLES, rel=ROUNDING)
    assert path["cosine"] == pytest.approx([1] * SAMPLES, rel=ROUNDING)
    assert (path["same_kept"], plain["same_kept"]) == (0, 1)


def test_the_plain_path_is_not_asked_twice():
    answers = {0: measured(CASE, 1.75)}
    (found,) = events(FakeBackend(), [CASE], answers, is_plain=True)
    assert found["accuracy"]["path"] == found["accuracy"]["plain"]


def test_a_model_that_cannot_be_had():
    class Full(FakeBackend):
        def model(self, config, weights, *, fast=False):
            raise MemoryError("full")

    answers = {place: measured(CASE, 1.75) for place in (0, 1)}
    found = events(Full(), [CASE, CASE], answers)
    assert [event["event"] for event in found] == ["unjudged", "unjudged"]


def test_when_it_holds():
    def close(cosine, distance):
        return Closeness(cosine=[1.0, cosine], distance=[0.0, distance], same_kept=None)

    def holds(path, plain):
        return dataclasses.replace(ACCURACY, path=path, plain=plain).holds

    assert ACCURACY.ratio == pytest.approx(0.5, rel=ROUNDING)
    assert holds(close(0.9991, 0.109), close(0.99, 0.1))
    assert not holds(close(0.9989, 0.05), close(1, 0.1))
    assert not holds(close(1, 0.111), close(1, 0.1))


@pytest.mark.parametrize("died", [False, True])
def test_rows_get_their_accuracy_afterwards(tmp_path, monkeypatch, died):
    accuracy = dataclasses.asdict(ACCURACY)
    after = f"tell(event='accuracy', place=1, accuracy={accuracy!r})"
    end = "os.kill(os.getpid(), signal.SIGKILL)" if died else "sys.exit()"
    unjudged = "tell(event='unjudged', place=0, error='MemoryError: full')"
    pretend(monkeypatch, "pass", f"{after}; {unjudged}; {end}")
    cases = [Case(batch=batch) for batch in (1, 2)]
    given = options(tmp_path, backend=next(iter(BACKENDS)), accuracy=True)
    found = bench.measure(given, cases, Console(quiet=True))
    assert [row.accuracy for row in found.rows] == [None, ACCURACY]
    assert read(tmp_path / "results.json") == found
    first, *others = [failure.error for failure in found.failures]
    assert first == "accuracy: MemoryError: full"
    assert [error.startswith("accuracy: the process was ended") for error in others] == [
        True
    ] * died
