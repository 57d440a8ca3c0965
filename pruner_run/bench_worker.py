"""A process of `pruner bench`: one backend by one path, measured in peace.

    python -m pruner_run.bench_worker < job.json

Reads a job, and writes an event a line: a JSON object with "event". What it measured is told at
once, so that it is not lost where the process dies.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import numpy as np

from pruner_run import backend as backends
from pruner_run import bench_accuracy, bench_weights
from pruner_run.backend import Backend, Model, Probe
from pruner_run.bench_accuracy import Answers, in_a_line
from pruner_run.bench_cases import UNPRUNED, Case, Setup, inputs
from pruner_run.bench_results import percentiles
from pruner_spec.config import Pi0Config
from pruner_spec.inference import InferenceSettings

WARM_UP = 10  # calls before those that are timed, after the first two
# Of the device that is measured: bytes to copy, and sides of matrices to multiply.
_COPIED = {"cuda": 2 << 30, "cpu": 64 << 20}
_PRODUCTS = {"cuda": (2048, 4096, 8192), "cpu": (256, 512)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What a process is to do.

    Attributes:
        backend: its name.
        path: "plain" or "fast".
        device: "cuda" or "cpu", which the backend must have.
        setup: of all cases.
        cases: to measure; none for the ceilings of the device.
        started: when the process was started, by `time.time`.
    """

    backend: str
    path: str
    device: str
    setup: Setup
    cases: tuple[Case, ...]
    started: float

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """From what `json.dumps` made of it as a dictionary."""
        data = json.loads(text)
        cases = tuple(Case(**case) for case in data["cases"])
        settings = InferenceSettings(**data["setup"]["settings"])
        setup = Setup(**data["setup"] | {"settings": settings})
        return cls(**data | {"setup": setup, "cases": cases})


def main() -> None:
    """Does the job on standard input."""
    with _only_events() as events:
        for event in _events(Job.from_json(sys.stdin.read())):
            events.write(json.dumps(event) + "\n")
            events.flush()


def _only_events() -> TextIO:
    """Standard output; what a library prints there goes to standard error from now on."""
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return events


def _events(job: Job) -> Iterator[dict[str, Any]]:
    times = [job.started, time.time()]
    probe = backends.probe(job.backend)
    times.append(time.time())
    if probe.device != job.device:
        title = backends.load(job.backend).title
        found = f"{title} finds none" if job.device == "cuda" else f"{title} computes elsewhere"
        error = f"device: expected a device for --device {job.device}, {found}: {probe.device!r}"
        yield {"event": "refused", "error": error}
        return
    if not job.cases:
        yield {"event": "ceilings", **ceilings(probe, job.setup.dtype)}
        return
    backend = backends.load(job.backend)
    times.append(time.time())
    parts = zip(("python", "framework", "project"), np.diff(times).tolist(), strict=True)
    yield {
        "event": "up",
        "device": probe.name,
        "versions": dict(probe.versions),
        "imports_s": dict(parts),
    }
    yield from _rows(job, backend, probe)


def _rows(job: Job, backend: Backend, probe: Probe) -> Iterator[dict[str, Any]]:
    """Each case's beginning, and then its row or its failure; at last what needs other models."""
    measuring, answers = Measuring(job, backend, probe), {}
    for place, case in enumerate(job.cases):
        yield {"event": "begin", "place": place}
        try:
            yield {"event": "row", "place": place, "row": measuring.row(case)}
            if job.setup.accuracy:
                answers[place] = measuring.answers(case)
        except Exception as error:  # out of memory, say: the next case may be smaller
            measuring.forget()
            yield {"event": "failed", "place": place, "error": in_a_line(error)}
    measuring.forget()
    probe.clear()
    yield from bench_accuracy.events(
        backend, job.setup, job.cases, answers, is_plain=job.path == "plain"
    )


class Measuring:
    """Measures cases one by one, with one model at a time."""

    def __init__(self, job: Job, backend: Backend, probe: Probe) -> None:
        self._job, self._backend, self._probe = job, backend, probe
        self._config: Pi0Config | None = None
        self._model: Model | None = None

    def forget(self) -> None:
        """Lets go of the model."""
        self._config = self._model = None

    def row(self, case: Case) -> dict[str, Any]:
        """What `Row` wants to know, but for the floor."""
        setup, config = self._job.setup, self._job.setup.model_config(case)
        observation, noise = inputs(case, setup)
        model, made = self._prepare(config)
        steps = case.num_steps

        def from_numpy() -> Any:
            return model.sample_actions(observation, noise, steps)

        warm_up = time.perf_counter()
        first_s, second_s = _seconds(from_numpy), _seconds(from_numpy)
        _check_finite(from_numpy())
        call = model.prepared(observation, noise, steps)
        self._probe.clear()  # what was needed to get ready is no part of the peak
        for _ in range(WARM_UP):
            call()
        warm_up_s = time.perf_counter() - warm_up
        device_ms = percentiles([_seconds(call) for _ in range(setup.calls)])
        numpy_ms = percentiles([_seconds(from_numpy) for _ in range(setup.calls)])
        peak = self._probe.peak_bytes()
        return {
            **_kept(model, config, case),
            "prefix_length": model.prefix_length(observation),
            "calls": setup.calls,
            **made,
            "first_s": first_s,
            "second_s": second_s,
            "warm_up_s": warm_up_s,
            "device_ms": device_ms,
            "numpy_ms": numpy_ms,
            "stages_ms": _stages(model, device_ms, (observation, noise, steps))
            if setup.stages
            else None,
            "peak_bytes": peak,
        }

    def answers(self, case: Case) -> Answers:
        """What is held to a reference, of the case that was measured last."""
        assert self._model is not None
        return bench_accuracy.answers(self._model, case, self._job.setup)

    def _prepare(self, config: Pi0Config) -> tuple[Model, dict[str, float | None]]:
        """The model of a config, and the seconds that it took to make."""
        if self._model is not None and self._config == config:
            return self._model, {"model_s": None, "reading_s": None}
        self.forget()
        self._probe.clear()
        started = time.perf_counter()
        weights, reading = bench_weights.clocked(self._job.setup.checkpoint)
        fast, settings = self._job.path == "fast", self._job.setup.settings
        model = self._backend.model(config, weights, fast=fast, settings=settings)
        self._config, self._model = config, model
        seconds = time.perf_counter() - started
        return model, {
            "model_s": seconds,
            "reading_s": None if reading is None else reading.seconds,
        }


def ceilings(probe: Probe, dtype: str) -> dict[str, Any]:
    """What the device reaches: bytes and operations a second."""
    size = _COPIED[probe.device]
    copied = probe.copy_ms(size)
    products = {side: probe.product_ms(side, dtype) for side in _PRODUCTS[probe.device]}
    return {
        "bandwidth": 2 * size / (1e-3 * copied),
        "rate": max(2 * side**3 / (1e-3 * ms) for side, ms in products.items()),
        "products": {str(side): ms for side, ms in products.items()},
    }


def _stages(model: Model, device_ms: dict[str, float], call: Any) -> dict[str, float]:
    """The stages, and what the whole call takes beyond them."""
    stages = model.stages(*call)
    return stages | {"host": device_ms["p50"] - sum(stages.values())}


def _kept(model: Model, config: Pi0Config, case: Case) -> dict[str, Any]:
    if case.keep == UNPRUNED:
        return {"kept": float(case.cameras * config.vision.num_patches), "kept_per_camera": {}}
    means = {camera: float(kept.sum(-1).mean()) for camera, kept in model.kept().items()}
    return {"kept": sum(means.values()), "kept_per_camera": means}


def _check_finite(actions: Any) -> None:
    """Raises a ValueError for actions whose time would say nothing."""
    if not np.isfinite(actions).all():
        raise ValueError("actions: expected finite numbers, got others")


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
