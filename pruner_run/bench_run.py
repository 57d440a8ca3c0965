"""A run of `pruner bench`: asks one process after the other, and writes down what they say."""

import dataclasses
import datetime
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pruner_run import bench_process, roofline
from pruner_run.bench_cases import Case
from pruner_run.bench_results import FILE, Failure, Results, Row, Start, accuracy_of
from pruner_run.bench_worker import Job
from pruner_run.roofline import Ceilings, Load

if TYPE_CHECKING:
    from pruner_run.bench import Options

_WIDTHS = {"bfloat16": 2, "float32": 4}


class Bench:
    """A run: what is to be measured, and what has been found so far, which is on disk too."""

    def __init__(self, options: "Options", cases: Sequence[Case], console: Console) -> None:
        self._options, self._cases, self._console = options, cases, console
        self._refused: dict[str, str] = {}
        self._found = Results(
            date=datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds"),
            host={"python": platform.python_version(), "machine": platform.machine()},
            options=options.described,
        )

    def measure_ceilings(self, names: Sequence[str]) -> None:
        """Asks the backends, one after the other, until one has measured the device."""
        for name in names:
            with self._console.status(f"{name}: the device's ceilings"):
                for event in bench_process.events(self._job(name, "plain", ())):
                    match event.pop("event"):
                        case "ceilings":
                            products = event.pop("products")
                            self._keep(ceilings=Ceilings(**event), products=products)
                            return
                        case "refused":
                            self._refused[name] = event["error"]

    def measure(self, name: str, path: str) -> None:
        """Measures all cases in a backend by a path.

        Where its process dies, the case that it was at has failed, and another process goes on
        with the next.
        """
        left = list(self._cases)
        if name in self._refused:
            self._add_failure(name, path, None, self._refused[name])
            return
        while left:
            at = self._session(name, path, left)
            left = left[at + 1 :]

    def start_again(self, name: str, path: str, number: int) -> None:
        """Starts another process, up to the second call of the first case."""
        if not any(row.backend == name and row.path == path for row in self._found.rows):
            return
        job = self._job(name, path, self._cases[:1])
        few = dataclasses.replace(job.setup, calls=1, stages=False, accuracy=False)
        job = dataclasses.replace(job, setup=few)
        up: dict[str, Any] = {}
        with self._console.status(f"{name}, {path}: start {number}"):
            for event in bench_process.events(job):
                match event["event"]:
                    case "up":
                        up = event
                    case "row":
                        start = _start(name, path, up, event["row"], number)
                        self._keep(starts=(*self._found.starts, start))
                    case "failed" | "refused" | "died":
                        self._add_failure(name, path, None, f"start {number}: {event['error']}")

    def finish(self) -> Results:
        """What was found, now that it is all."""
        self._keep(complete=True)
        return self._found

    def _session(self, name: str, path: str, cases: Sequence[Case]) -> int:
        """Measures as many cases as a process lives for; the place of the last one it tried."""
        at, is_open, up, title = -1, False, {}, f"{name}, {path}"
        with self._console.status(f"{title}: starting") as status:
            for event in bench_process.events(self._job(name, path, cases)):
                match event["event"]:
                    case "up":
                        up = event
                    case "begin":
                        at, is_open = event["place"], True
                        status.update(f"{title}: {at + 1} of {len(cases)}, {cases[at].title}")
                    case "row":
                        is_open = False
                        self._add_row(name, path, cases[at], up, event["row"])
                    case "failed":
                        is_open = False
                        self._add_failure(name, path, cases[at], event["error"])
                    case "accuracy":
                        self._judge(name, path, cases[event["place"]], event["accuracy"])
                    case "unjudged":
                        error = f"accuracy: {event['error']}"
                        self._add_failure(name, path, cases[event["place"]], error)
                    case "died" if is_open:
                        self._add_failure(name, path, cases[at], event["error"])
                    case "died" if at == len(cases) - 1:  # all is timed
                        self._add_failure(name, path, None, f"accuracy: {event['error']}")
                    case "refused" | "died" if at < 0:
                        self._add_failure(name, path, None, event["error"])
                        return len(cases)
        return at if at >= 0 else len(cases)

    def _add_row(
        self, name: str, path: str, case: Case, up: dict[str, Any], found: dict[str, Any]
    ) -> None:
        row = Row(backend=name, path=path, case=case, **found, **self._floor(case, found["kept"]))
        starts = self._found.starts
        if not any((start.backend, start.path) == (name, path) for start in starts):
            starts = (*starts, _start(name, path, up, found))
        self._keep(rows=(*self._found.rows, row), starts=starts)

    def _judge(self, name: str, path: str, case: Case, found: dict[str, Any]) -> None:
        """Gives a row its accuracy, which comes after all rows."""
        accuracy = accuracy_of(found)
        rows = [
            dataclasses.replace(row, accuracy=accuracy)
            if (row.backend, row.path, row.case) == (name, path, case)
            else row
            for row in self._found.rows
        ]
        self._keep(rows=tuple(rows))

    def _add_failure(self, name: str, path: str, case: Case | None, error: str) -> None:
        failure = Failure(backend=name, path=path, case=case, error=error)
        self._keep(failures=(*self._found.failures, failure))

    def _floor(self, case: Case, kept: float) -> dict[str, Any]:
        """The floor of a case, by what it kept."""
        load = Load(
            kept=kept,
            prompt=case.prompt,
            cameras=case.cameras,
            batch=case.batch,
            num_steps=case.num_steps,
            width=_WIDTHS[self._options.dtype],
        )
        phases = roofline.work(self._options.setup.model_config(case), load)
        ceilings = self._found.ceilings
        return {
            "operations": sum(phase.operations for phase in phases.values()),
            "floor_ms": None if ceilings is None else roofline.floor(phases, ceilings),
        }

    def _job(self, name: str, path: str, cases: Sequence[Case]) -> Job:
        return Job(
            backend=name,
            path=path,
            device=self._options.device,
            setup=self._options.setup_of(path),
            cases=tuple(cases),
            started=0.0,
        )

    def _keep(self, **changes: Any) -> None:
        self._found = dataclasses.replace(self._found, **changes)
        if self._found.rows:
            self._found.save(self._options.output / FILE)


def _start(name: str, path: str, up: dict[str, Any], row: dict[str, Any], number: int = 1) -> Start:
    """How a process came up, of which this is the first row."""
    told = {key: up[key] for key in ("device", "versions", "imports_s")}
    seconds = {key: row[key] for key in ("reading_s", "first_s", "second_s")}
    # A process that goes on after one that died has a model of its own, and so its seconds.
    return Start(
        backend=name, path=path, model_s=row["model_s"] or 0.0, number=number, **told, **seconds
    )
