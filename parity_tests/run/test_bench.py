"""`pruner bench`: what it measures, writes and shows, with a tiny model on the CPU."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from rich.console import Console

from benchmarks.inference_speed import PARTS
from parity_tests.harness import BACKENDS
from parity_tests.tolerances import tolerance
from pruner_run import backend as backends
from pruner_run import bench, bench_cases, bench_process, bench_report, cli
from pruner_run.bench_cases import Case, Setup
from pruner_run.bench_picture import SWEEPS, along
from pruner_run.bench_results import Failure, Results, Row, Start, percentiles, read
from pruner_run.roofline import Ceilings

NAMES = ",".join(BACKENDS)
ROUNDING = tolerance("statistics", "float64")
TINY = {"device": "cpu", "config": "tiny", "calls": 3, "num_steps": "1", "keep": "implicit"}

# Processes that do as a worker does until something happens to them.
FAKE_ROW = {
    "kept": 60.0,
    "kept_per_camera": {},
    "prefix_length": 128,
    "model_s": 0.1,
    "first_s": 0.2,
    "second_s": 0.1,
    "warm_up_s": 0.5,
    "device_ms": {"p50": 2.0, "p90": 2.1, "p99": 2.2, "min": 1.9},
    "numpy_ms": {"p50": 3.0, "p90": 3.1, "p99": 3.2, "min": 2.9},
    "stages_ms": {"vision": 0.5, "pruning": 0.1, "prefix": 0.4, "denoising": 0.8, "host": 0.2},
    "peak_bytes": {"resident": 1 << 30},
}
FAKE = f"""
import json, os, signal, sys
job = json.load(sys.stdin)
row = json.loads({json.dumps(json.dumps(FAKE_ROW))})
def tell(**event): print(json.dumps(event), flush=True)
if not job["cases"]:
    tell(event="ceilings", bandwidth=4.3e12, rate=794e12, products={{"4096": 0.17}})
    sys.exit()
tell(event="up", device="pretended", versions={{"torch": "0"}}, imports_s=1.0)
for place, case in enumerate(job["cases"]):
    tell(event="begin", place=place)
    DO
    tell(event="row", place=place, row=row)
"""


def pretend(monkeypatch, act: str) -> None:
    """Has workers `act`, in the midst of each case, in the place of measuring."""
    worker = (sys.executable, "-c", FAKE.replace("DO", act))
    monkeypatch.setattr(bench_process, "WORKER", worker)


def options(folder, **changes) -> bench.Options:
    return bench.Options(**({"output": folder, "backend": NAMES, **TINY} | changes))


def made_up() -> Results:
    """Of both backends, as if measured: cameras, batches, steps and prefixes vary."""
    cases = [Case(keep="64", cameras=cameras) for cameras in (1, 2, 3)]
    cases += [Case(keep="64", batch=batch) for batch in (2, 4)]
    cases += [Case(keep="64", num_steps=steps) for steps in (1, 20)]
    cases += [Case(keep=keep) for keep in ("24", "none")]
    rows = []
    for name in ("torch", "jax"):
        for case in cases:
            kept = 768.0 if case.keep == "none" else 1.0 * int(case.keep) * case.cameras
            floor = {"vision": 0.1, "prefix": 0.2, "denoising": 0.7, "total": 1.0}
            found = FAKE_ROW | {"kept": kept, "floor_ms": floor, "operations": 1e12}
            rows.append(Row(backend=name, path="plain", case=case, **found))
    start = Start(
        backend="torch",
        path="plain",
        device="pretended",
        versions={"torch": "0"},
        imports_s=1.0,
        model_s=0.5,
        first_s=2.0,
        second_s=0.1,
    )
    failure = Failure(backend="jax", path="plain", case=Case(batch=32), error="out of | memory")
    return Results(
        date="2026-01-02T03:04:05+00:00",
        host={"python": "3.12.0", "machine": "x86_64"},
        options={"config": "pi05", "dtype": "bfloat16", "calls": 100, "device": "cuda"},
        ceilings=Ceilings(bandwidth=4.3e12, rate=794e12),
        products={"4096": 0.173},
        starts=(start,),
        rows=tuple(rows),
        failures=(failure,),
        complete=True,
    )


@pytest.mark.parametrize(
    "names", [[*BACKENDS][-1:], pytest.param([*BACKENDS], marks=pytest.mark.slow)]
)
def test_what_is_measured(names, tmp_path, capsys):
    """Of one backend, and of all in one run: what is in the file, and that it is printed."""
    given = {"backend": ",".join(names), "implicit_kept": 61, "batch": "2", "cameras": "2"}
    bench.run(options(tmp_path, **given))
    said = capsys.readouterr().out
    found = read(tmp_path / "results.json")
    assert found.complete
    assert found.failures == ()
    assert [row.backend for row in found.rows] == [start.backend for start in found.starts] == names
    assert found.ceilings is not None
    for row, start in zip(found.rows, found.starts, strict=True):
        assert row.case == Case(keep="implicit", batch=2, cameras=2, num_steps=1)
        assert row.kept_per_camera == {"base_0_rgb": 31, "left_wrist_0_rgb": 31}
        assert (row.kept, row.prefix_length) == (62, 64 + 64)
        check_times(row)
        assert row.peak_bytes["resident"] > 50e6
        assert start.imports_s < start.ready_s < 300
        assert start.versions[row.backend]
        assert f"{row.backend} plain" in said
    assert "pruning's share" in said


def check_times(row):
    for times in (row.device_ms, row.numpy_ms):
        assert 0 < times["min"] <= times["p50"] <= times["p90"] <= times["p99"]
    stages = dict(row.stages_ms)
    assert sum(stages.values()) == pytest.approx(row.device_ms["p50"], rel=ROUNDING)
    del stages["host"]
    assert stages.keys() == {"vision", "pruning", "prefix", "denoising"}
    assert min(stages.values()) > 0
    phases = [row.floor_ms[phase] for phase in ("vision", "prefix", "denoising")]
    assert row.floor_ms["total"] == pytest.approx(sum(phases), rel=ROUNDING)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_prepared_call_is_the_same_call(name):
    setup = Setup(config="tiny", dtype="float32")
    case = Case(keep="24", prompt=20, batch=2, cameras=1, num_steps=2)
    observation, noise = bench_cases.inputs(case, setup)
    model = backends.load(name).model(setup.model_config(case), None)
    actions = model.sample_actions(observation, noise, case.num_steps)
    call = model.prepared(observation, noise, case.num_steps)
    np.testing.assert_array_equal(np.asarray(call()), actions)
    assert model.prefix_length(observation) == 24 + 32
    assert np.isfinite(actions).all()
    assert not np.array_equal(actions[0], actions[1])


@pytest.mark.parametrize("name", BACKENDS)
def test_there_is_no_fast_way_yet(name):
    with pytest.raises(ValueError, match="path: expected 'plain', got 'fast'"):
        backends.load(name).model(bench_cases.MODELS["tiny"], None, fast=True)


def test_the_product_of_the_axes():
    axes = {"cameras": "2", "prompt": "50, 200", "keep": "none,64,none", "batch": "1,8"}
    cases = bench_cases.product(axes)
    assert len(cases) == len(set(cases)) == 2 * 2 * 2
    assert {case.keep for case in cases[:4]} == {"none"}
    assert Case(cameras=2, prompt=200, keep="64", batch=8) in cases


def test_the_parts_of_the_page_can_be_measured():
    for cases in PARTS.values():
        bench_cases.check(cases, Setup())
        assert len(set(cases)) == len(cases)
    shortest, longest = PARTS["prefix"][0], PARTS["prefix"][-1]
    assert 3 * int(shortest.keep) + shortest.prompt == 64
    assert (longest.keep, 3 * 256 + longest.prompt) == ("none", 968)


def test_percentiles():
    found = percentiles([each / 1000 for each in range(101)])
    assert found == pytest.approx({"p50": 50, "p90": 90, "p99": 99, "min": 0}, rel=ROUNDING)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "torch,tensorflow"}, "backend: expected a list of jax and torch, got 'tens"),
        ({"config": "pi06"}, "config: expected one of pi05, pi0, tiny, got 'pi06'"),
        ({"keep": "most"}, "keep: expected 'none', 'implicit' or whole numbers.*got 'most'"),
        ({"keep": "1000"}, "token_prune_keep_tokens: expected at most the 256 patches"),
        ({"keep": "0"}, "token_prune_keep_tokens: expected an integer >= 1, got 0"),
        ({"cameras": "3,4"}, "cameras: expected 1..3, got 4"),
        ({"prompt": "201"}, "prompt: expected 1..200 tokens, got 201"),
        ({"batch": "1,"}, "batch: expected whole numbers, separated by commas; got ''"),
        ({"batch": "0"}, "batch: expected at least 1, got 0"),
        ({"num_steps": "0"}, "num_steps: expected an integer >= 1, got 0"),
        ({"horizon": "-5"}, "horizon: expected whole numbers"),
        ({"calls": 0}, "calls: expected at least 1, got 0"),
        ({"implicit_kept": 0}, "implicit_kept: expected at least 1, got 0"),
        ({"implicit_kept": 1000}, "token_prune_min_keep: expected at most the 256"),
    ],
)
def test_what_cannot_be_measured(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        bench.run(options(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    name = next(reversed(BACKENDS))
    arguments = ["bench", "--backend", name, "--config", "tiny", "--output", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == cli.BAD_INPUT
    said = capsys.readouterr().err
    assert "device: expected a device for --device cuda" in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_dies_costs_its_row(tmp_path, monkeypatch):
    pretend(monkeypatch, "if case['batch'] == 2: os.kill(os.getpid(), signal.SIGKILL)")
    found = bench.measure(
        options(tmp_path, backend=next(iter(BACKENDS))),
        [Case(batch=batch) for batch in (1, 2, 4)],
        Console(quiet=True),
    )
    assert [row.case.batch for row in found.rows] == [1, 4]
    (failure,) = found.failures
    assert failure.case == Case(batch=2)
    assert "SIGKILL, as the system does where memory is short" in failure.error
    assert len(found.starts) == 1
    assert read(tmp_path / "results.json") == found


def test_a_run_that_is_broken_off_leaves_what_it_measured(tmp_path, monkeypatch):
    pretend(monkeypatch, "")
    keep = bench.Bench._add_row

    def interrupted(self, *arguments):
        keep(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.Bench, "_add_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.run(options(tmp_path, batch="1,2"))
    found = read(tmp_path / "results.json")
    assert len(found.rows) == 1
    assert not found.complete
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_worker_that_cannot_start(tmp_path, monkeypatch):
    pretend(monkeypatch, "sys.exit('libcuda is broken')")
    monkeypatch.setattr(bench_process, "WORKER", (sys.executable, "-c", "exit('no framework')"))
    with pytest.raises(ValueError, match="ended with status 1: no framework"):
        bench.run(options(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_fails_is_told_from_one_that_kills(tmp_path, monkeypatch):
    act = "tell(event='failed', place=place, error='OutOfMemoryError: 1 TiB'); continue"
    pretend(monkeypatch, f"if case['batch'] == 1: {act}")
    cases = [Case(batch=1), Case(batch=2)]
    found = bench.measure(
        options(tmp_path, backend=next(iter(BACKENDS))), cases, Console(quiet=True)
    )
    assert [row.case.batch for row in found.rows] == [2]
    assert [failure.error for failure in found.failures] == ["OutOfMemoryError: 1 TiB"]


def test_results_are_not_replaced_unasked(tmp_path, monkeypatch):
    pretend(monkeypatch, "")
    (tmp_path / "results.json").write_text("precious")
    with pytest.raises(FileExistsError, match="--overwrite"):
        bench.run(options(tmp_path))
    assert (tmp_path / "results.json").read_text() == "precious"
    bench.run(options(tmp_path, overwrite=True))
    assert read(tmp_path / "results.json").rows


def test_the_page_and_its_picture(tmp_path):
    file, page = tmp_path / "bench.json", tmp_path / "docs" / "speed.md"
    made_up().save(file)
    assert read(file) == made_up()
    page.parent.mkdir()
    page.write_text("# Speed\n\nBy hand.\n\n" + bench_report.MARK + "stale")
    bench.run(bench.Options(report=(file,), page=page))
    text = page.read_text()
    assert text.startswith("# Speed\n\nBy hand.\n\n" + bench_report.MARK)
    assert "stale" not in text
    for part in ("2026-01-02, pretended", "copy 4.30 TB/s", "| torch plain |", "out of / memory"):
        assert part in text
    assert "No result" not in text
    assert page.with_suffix(".png").stat().st_size > 10_000
    other = tmp_path / "bench_settings" / "results.json"
    other.parent.mkdir()
    made_up().save(other)
    bench.run(bench.Options(report=(file, other), page=page))
    assert "## bench\n" in (text := page.read_text())
    assert "## bench_settings\n" in text


def test_a_try_does_not_pose_as_a_result():
    results = made_up()
    for changes in ({"config": "tiny"}, {"device": "cpu"}):
        tried = dataclasses.replace(results, options={**results.options, **changes})
        assert "No result" in bench_report.section(bench.Path("try.json"), tried)


def test_what_grows_is_found():
    rows = made_up().rows
    places = {
        sweep.title: sorted({sweep.place(row) for row in along(rows, sweep)}) for sweep in SWEEPS
    }
    assert places == {
        "prefix, tokens": [122, 242, 818],
        "cameras": [1, 2, 3],
        "batch": [1, 2, 4],
        "denoising steps": [1, 10, 20],
    }
    assert along(rows[:1], SWEEPS[0]) == []


@pytest.mark.parametrize("text", ["no json", "{}", '{"format": 2}', "[]"])
def test_a_file_that_holds_no_results(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json: expected results of `pruner bench`"):
        bench.run(bench.Options(report=(tmp_path / "x.json",), page=tmp_path / "speed.md"))
    assert not (tmp_path / "speed.md").exists()
