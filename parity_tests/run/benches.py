"""Runs of `pruner bench` for its tests: a tiny one's options, workers that pretend, results."""

import json
import sys

from parity_tests.harness import BACKENDS
from pruner_run import bench, bench_process
from pruner_run.bench_cases import Case
from pruner_run.bench_results import Accuracy, Closeness, Failure, Results, Row, Start
from pruner_run.roofline import Ceilings

NAMES = ",".join(BACKENDS)
TINY = {"device": "cpu", "config": "tiny", "calls": 3, "num_steps": "1", "keep": "implicit"}

# Processes that do as a worker does until something happens to them.
FAKE_ROW = {
    "calls": 100,
    "kept": 60.0,
    "kept_per_camera": {},
    "prefix_length": 128,
    "model_s": 0.1,
    "reading_s": None,
    "first_s": 0.2,
    "second_s": 0.1,
    "warm_up_s": 0.5,
    "device_ms": {"p50": 2.0, "p90": 2.1, "p99": 2.2, "min": 1.9},
    "numpy_ms": {"p50": 3.0, "p90": 3.1, "p99": 3.2, "min": 2.9},
    "stages_ms": {"vision": 0.5, "pruning": 0.1, "prefix": 0.4, "denoising": 0.8, "host": 0.2},
    "peak_bytes": {"resident": 1 << 30},
}
ACCURACY = Accuracy(
    path=Closeness(cosine=[0.9992, 0.9999], distance=[0.01, 0.02], same_kept=0.98),
    plain=Closeness(cosine=[0.9999, 0.9993], distance=[0.02, 0.04], same_kept=1.0),
)
FAKE = f"""
import json, os, signal, sys
job = json.load(sys.stdin)
row = json.loads({json.dumps(json.dumps(FAKE_ROW))})
imports = {{"python": 0.2, "framework": 0.7, "project": 0.1}}
def tell(**event): print(json.dumps(event), flush=True)
if not job["cases"]:
    tell(event="ceilings", bandwidth=4.3e12, rate=794e12, products={{"4096": 0.17}})
    sys.exit()
tell(event="up", device="pretended", versions={{"torch": "0"}}, imports_s=imports)
for place, case in enumerate(job["cases"]):
    tell(event="begin", place=place)
    DO
    tell(event="row", place=place, row=row)
if job["setup"]["accuracy"]:
    AFTER
"""


def pretend(monkeypatch, act: str, after: str = "pass") -> None:
    """Has workers `act`, in the midst of each case, in the place of measuring, and `after` all."""
    worker = (sys.executable, "-c", FAKE.replace("DO", act).replace("AFTER", after))
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
            found["accuracy"] = ACCURACY
            rows.append(Row(backend=name, path="plain", case=case, **found))
    start = Start(
        backend="torch",
        path="plain",
        device="pretended",
        versions={"torch": "0"},
        imports_s={"python": 0.2, "framework": 0.7, "project": 0.1},
        reading_s=0.2,
        model_s=0.5,
        first_s=2.0,
        second_s=0.1,
    )
    failure = Failure(backend="jax", path="plain", case=Case(batch=32), error="out of | memory")
    return Results(
        date="2026-01-02T03:04:05+00:00",
        host={"python": "3.12.0", "machine": "x86_64"},
        options={
            "config": "pi05",
            "dtype": "bfloat16",
            "calls": 100,
            "device": "cuda",
            "checkpoint": None,
        },
        ceilings=Ceilings(bandwidth=4.3e12, rate=794e12),
        products={"4096": 0.173},
        starts=(start,),
        rows=tuple(rows),
        failures=(failure,),
        complete=True,
    )
