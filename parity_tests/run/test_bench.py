"""`pruner bench`: what it measures, writes and shows, with a tiny model on the CPU."""

import dataclasses
import json
import sys
from unittest import mock

import numpy as np
import pytest
from rich.console import Console

from benchmarks.inference_speed import PARTS
from parity_tests.harness import BACKENDS, error
from parity_tests.run.benches import made_up, options, pretend
from parity_tests.tolerances import tolerance
from pruner_run import backend as backends
from pruner_run import bench, bench_cases, bench_process, bench_report, cli
from pruner_run.bench_cases import Case, Setup
from pruner_run.bench_picture import SWEEPS, along
from pruner_run.bench_results import percentiles, read
from pruner_run.bench_worker import Job, Measuring
from pruner_run.inference_flags import FLAGS
from pruner_spec.inference import InferenceSettings

pytestmark = pytest.mark.usefixtures("compile_fast")

ONE = [*BACKENDS][-1]
ROUNDING = tolerance("statistics", "float64")


@pytest.mark.parametrize(
    "names", [[*BACKENDS][-1:], pytest.param([*BACKENDS], marks=pytest.mark.slow)]
)
def test_what_is_measured(names, tmp_path, capsys):
    """Of one backend, and of all in one run: what is in the file, and that it is printed.

    The fast path and the plain one have the same work, and the same to say.
    """
    given = {"backend": ",".join(names), "implicit_kept": 61, "batch": "4", "cameras": "2"}
    ways = {"path": "both", "plain_calls": 2, "accuracy": True}
    bench.run(options(tmp_path, **given, **ways))
    said = capsys.readouterr().out
    found = read(tmp_path / "results.json")
    assert found.complete
    assert found.failures == ()
    both = [(name, path) for name in names for path in ("fast", "plain")]
    assert [(row.backend, row.path) for row in found.rows] == both
    assert [(start.backend, start.path) for start in found.starts] == both
    assert found.ceilings is not None
    for row, start in zip(found.rows, found.starts, strict=True):
        assert row.case == Case(keep="implicit", batch=4, cameras=2, num_steps=1)
        assert row.calls == {"fast": 3, "plain": 2}[row.path]
        assert row.kept_per_camera == {"base_0_rgb": 31, "left_wrist_0_rgb": 31}
        assert (row.kept, row.prefix_length) == (62, 64 + 64)
        check_times(row)
        assert row.peak_bytes["resident"] > 50e6
        assert sum(start.imports_s.values()) < start.ready_s < 300
        assert start.versions[row.backend]
        assert f"{row.backend} {row.path}" in said
        if row.path == "plain":
            assert row.accuracy is None  # the fast one's says it
            continue
        assert row.accuracy.holds
        assert len(row.accuracy.path.cosine) == len(row.accuracy.plain.distance) == 8
        assert row.accuracy.path.mean_distance > 0
        assert 0.9 < row.accuracy.path.same_kept <= 1
    assert "pruning's share" in said
    assert "same kept" in said


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
def test_both_ways_lead_to_the_same_actions(name):
    """And a prepared call to those of one from NumPy."""
    setup = Setup(config="tiny", dtype="float32")
    case = Case(keep="24", prompt=20, batch=2, cameras=1, num_steps=2)
    observation, noise = bench_cases.inputs(case, setup)
    found = []
    for fast in (False, True):
        model = backends.load(name).model(setup.model_config(case), None, fast=fast)
        actions = model.sample_actions(observation, noise, case.num_steps)
        call = model.prepared(observation, noise, case.num_steps)
        np.testing.assert_array_equal(np.asarray(call()), actions)
        assert model.prefix_length(observation) == 24 + 32
        assert np.isfinite(actions).all()
        assert not np.array_equal(actions[0], actions[1])
        found.append(actions)
    assert error(*found) < tolerance("same computation", "float32")


@pytest.mark.parametrize("guess", [None, 32])
def test_pruning_is_timed_as_in_a_call(guess):
    """Which asks the device for a number only where it has none to try first."""
    stages, capacity = mock.Mock(), mock.Mock(return_value=64)
    stages.expected.return_value = guess
    given = mock.Mock(), mock.Mock(), mock.Mock(), 10
    found = backends.stage_times(stages, *given, capacity=capacity, finish=lambda result: result)
    assert capacity.called == (guess is None)
    assert stages.prune.call_args.args[2] == (guess or 64)
    assert min(found.values()) > 0


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
        ({"plain_calls": 0}, "plain_calls: expected at least 1, got 0"),
        ({"starts": 0}, "starts: expected at least 1, got 0"),
        ({"implicit_kept": 0}, "implicit_kept: expected at least 1, got 0"),
        ({"path": "plain", "no_graphs": True}, "path: expected the fast way with --no_graphs"),
        ({"backend": "jax", "compiled": True}, "backend: expected torch alone with --compiled"),
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


def test_settings_of_the_fast_path(tmp_path, monkeypatch):
    """They reach its workers, not the plain path's, and stand in the file and on the page."""
    settings = "{name: float(value) for name, value in job['setup']['settings'].items()}"
    pretend(monkeypatch, f"row['kept_per_camera'] = {settings}")
    given = options(tmp_path, backend=ONE, path="both", no_guess=True, float8=True, starts=2)
    found = bench.measure(given, [Case()], Console(quiet=True))
    changed, plain = (InferenceSettings(**row.kept_per_camera).changed for row in found.rows)
    assert (changed, plain) == ({"guess": False, "float8": True}, {})
    told = {name: found.options[name] for name in FLAGS}
    assert told == {**dict.fromkeys(FLAGS, False), "no_guess": True, "float8": True}
    page = bench_report.section(bench.Path("fast.json"), found)
    assert "random weights, `--no_guess`, `--float8`. " in page
    assert "random weights. " in bench_report.section(bench.Path("old.json"), made_up())


@pytest.mark.parametrize("path", ["fast", "plain"])
def test_a_worker_gives_settings_to_its_model(path):
    setup = Setup(config="tiny", settings=InferenceSettings(graphs=False))
    job = Job(backend=ONE, path=path, device="cpu", setup=setup, cases=(Case(),), started=0.0)
    assert Job.from_json(json.dumps(dataclasses.asdict(job))) == job
    backend = mock.Mock()
    Measuring(job, backend, mock.Mock())._prepare(setup.model_config(Case()))
    given = {"fast": path == "fast", "settings": setup.settings}
    assert backend.model.call_args.kwargs == given


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
    parts = ("2026-01-02, pretended", "copy 4.30 TB/s", "| torch plain |", "out of / memory")
    for part in (*parts, "random weights", "| 0.999200 | 0.999300 |", "| 0.500 | yes |"):
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


def test_one_picture_is_of_one_device_and_of_the_same_flags():
    results = made_up()
    rounded = dataclasses.replace(results, options={**results.options, "float8": True})
    starts = [dataclasses.replace(start, device="another") for start in results.starts]
    elsewhere = dataclasses.replace(results, starts=tuple(starts))
    assert bench_report._alike([results, rounded, elsewhere, results]) == [results, results]
    assert bench_report._alike([rounded, results]) == [rounded]


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


@pytest.mark.parametrize("text", ["no json", "{}", '{"format": 1}', "[]"])
def test_a_file_that_holds_no_results(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json: expected results of `pruner bench`"):
        bench.run(bench.Options(report=(tmp_path / "x.json",), page=tmp_path / "speed.md"))
    assert not (tmp_path / "speed.md").exists()
