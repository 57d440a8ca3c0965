"""The converter's benchmark runs, and says what it must; its times are no test's business."""

import json

import pytest

from parity_tests.harness import BACKENDS

pytestmark = pytest.mark.skipif("jax" not in BACKENDS, reason="Orbax needs JAX")

from benchmarks import big_checkpoints, convert_report
from benchmarks.convert_checkpoint import Options, main


@pytest.mark.slow
def test_it_runs(tmp_path):
    output, page = tmp_path / "results.json", tmp_path / "page.md"
    options = {"folder": tmp_path / "work", "size": "small", "repetitions": 1}
    main(Options(**options, output=output, markdown=page))
    found = json.loads(output.read_text())
    assert {(run["source"], run["step"]) for run in found["runs"]} == {
        (storage, step)
        for storage in ("whole", "chunked")
        for step in (
            *("copy", "start", "float32", "bfloat16"),
            *("whole tree, float32", "whole tree, bfloat16"),
        )
    } | {("safetensors", step) for step in ("copy", "float32", "bfloat16")}
    assert not any(run["out_of_memory"] for run in found["runs"])
    assert all(run["wall"] > 0 < run["peak"] for run in found["runs"])
    assert convert_report.page(found) == page.read_text()
    assert not any((tmp_path / "work").iterdir())


def test_both_storages_hold_the_same_numbers(tmp_path):
    from convert.reading import open_checkpoint

    big_checkpoints.write(tmp_path, "small")
    whole, chunked = (open_checkpoint(tmp_path / name) for name in big_checkpoints.STORAGES)
    assert whole.keys() == chunked.keys() == big_checkpoints.shapes("small").keys()
    for name, array in whole.items():
        assert array.chunks == array.shape
        assert (array[...] == chunked[name][...]).all(), name
    assert sum(array.chunks != array.shape for array in chunked.values()) > 20


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((18, 2, 2048, 16384), (18, 2, 2048, 2048)),
        ((27, 1152, 4304), (27, 1152, 538)),
        ((18, 8, 256, 1024), (18, 8, 256, 128)),
        ((32, 1024), (32, 1024)),  # small
        ((3_000_000,), (3_000_000,)),  # a vector
        ((3, 1_000_003), (3, 1_000_003)),  # nothing to divide by eight
    ],
)
def test_shards_are_openpis(shape, expected):
    assert big_checkpoints.chunk_shape(shape, "chunked", "full") == expected
    assert big_checkpoints.chunk_shape(shape, "whole", "full") == shape


def run(source, step, wall, peak_gib=1.0, repetition=0, out_of_memory=False):
    return {
        "source": source,
        "step": step,
        "repetition": repetition,
        "wall": wall,
        "peak": round(peak_gib * 10) * (2**30 // 10),
        "out_of_memory": out_of_memory,
    }


@pytest.mark.parametrize(
    ("wall", "peak", "their_peak", "missed"),
    [
        (20.0, 1.6, 4.8, set()),
        (20.1, 1.6, 4.8, {"time"}),
        (20.0, 1.7, 5.1, {"memory"}),
        (20.0, 1.6, 4.7, {"a third of the whole tree's memory"}),
        (35.0, 1.6, 4.8, {"time", "not slower than the whole tree"}),
    ],
)
def test_goals(wall, peak, their_peak, missed):
    found = {
        "largest": {"chunked": 2**29},
        "runs": [
            run("chunked", "copy", 10.0),
            run("chunked", "float32", wall, peak),
            run("chunked", "whole tree, float32", 30.0, their_peak),
        ],
    }
    goals = convert_report.goals(found, "chunked", "float32")
    assert {name for name, is_met in goals.items() if not is_met} == missed
