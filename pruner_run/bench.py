"""`pruner bench`: how long a call takes, where its time goes, and how far it is from the floor."""

import dataclasses
import datetime
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from pruner_run import backend as backends
from pruner_run import bench_cases, bench_process, bench_report, bench_table, roofline
from pruner_run.bench_cases import Case, Setup
from pruner_run.bench_results import FILE, Failure, Results, Row, Start
from pruner_run.bench_worker import Job
from pruner_run.roofline import Ceilings, Load

_WIDTHS = {"bfloat16": 2, "float32": 4}
_WIDE = 160  # characters of a table that goes into a file
_AXES = ("cameras", "prompt", "keep", "batch", "horizon", "num_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Measure calls of a model with random weights, against the floor of the device.

    Where a list is asked for, its entries are separated by commas, and every choice of one entry a
    list is measured. Writes results.json.

    Attributes:
        backend: a list of jax and torch; all that are installed, if not given.
        device: the GPU, or the CPU.
        path: the way through the model: that which is made for speed, the plain one, or both.
        cameras: a list of how many there are.
        prompt: a list of how many tokens it has.
        keep: a list of budgets a camera, "implicit" for the union of votes, "none" for no pruning.
        batch: a list of samples a call.
        horizon: a list of actions in a chunk.
        num_steps: a list of denoising steps.
        config: the model: pi05, pi0, or tiny, to try the command.
        dtype: of the computation.
        implicit_kept: patches that the implicit selection keeps in all, at least. Random weights
            vote for few.
        calls: that are timed, of each kind.
        no_stages: do not time the stages apart. In JAX that compiles each of them.
        seed: of images, states and noise.
        output: folder for results.json.
        overwrite: replace a results.json that is there.
        report: files of results to make a page of, instead of measuring.
        page: the page. What stands above its mark is kept; a picture is drawn beside it.
    """

    backend: str | None = None
    device: Literal["cuda", "cpu"] = "cuda"
    path: Literal["fast", "plain", "both"] = "plain"
    cameras: str = "3"
    prompt: str = "50"
    keep: str = "implicit,64,24,none"
    batch: str = "1"
    horizon: str = "50"
    num_steps: str = "10"
    config: str = "pi05"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    implicit_kept: int = 60
    calls: int = 100
    no_stages: tyro.conf.FlagCreatePairsOff[bool] = False
    seed: int = 0
    output: Path = Path("bench_output")
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    report: tuple[Path, ...] = ()
    page: Path = Path("docs/speed.md")

    @property
    def setup(self) -> Setup:
        """What all cases have in common."""
        return Setup(
            config=self.config,
            dtype=self.dtype,
            implicit_kept=self.implicit_kept,
            calls=self.calls,
            stages=not self.no_stages,
            seed=self.seed,
        )


def run(options: Options) -> None:
    """Measures, or makes a page of what was measured.

    Raises:
        ValueError: an option is not valid, or nothing could be measured.
        OSError: the output cannot be written, or is there already.
    """
    console = wide_console()
    if options.report:
        bench_report.write(options.report, options.page)
        console.print(f"Wrote {options.page} and {options.page.with_suffix('.png')}")
        return
    cases = bench_cases.product({axis: getattr(options, axis) for axis in _AXES})
    measure(options, cases, console)


def wide_console() -> Console:
    """Where tables are printed; one that is no terminal has room for them."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDE
    return console


def measure(options: Options, cases: Sequence[Case], console: Console) -> Results:
    """Measures cases, whatever the options' lists say; writes and prints what was found.

    Raises:
        ValueError: an option is not valid, or nothing could be measured.
        OSError: the output cannot be written, or is there already.
    """
    names = _backends(options.backend)
    bench_cases.check(cases, options.setup)
    path = options.output / FILE
    if path.exists() and not options.overwrite:
        raise FileExistsError(f"output: expected no {path}, or --overwrite")
    options.output.mkdir(parents=True, exist_ok=True)
    paths = ("plain", "fast") if options.path == "both" else (options.path,)
    bench = Bench(options, cases, console)
    bench.measure_ceilings(names)
    for name in names:
        for way in paths:
            bench.measure(name, way)
    results = bench.finish()
    bench_table.show(console, results)
    if not results.rows:
        reasons = dict.fromkeys(failure.error for failure in results.failures)
        raise ValueError("; ".join(reasons))
    console.print(f"Wrote {path}")
    return results


class Bench:
    """A run: what is to be measured, and what has been found so far, which is on disk too."""

    def __init__(self, options: Options, cases: Sequence[Case], console: Console) -> None:
        self._options, self._cases, self._console = options, cases, console
        self._refused: dict[str, str] = {}
        self._found = Results(
            date=datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds"),
            host={"python": platform.python_version(), "machine": platform.machine()},
            options=_plain(options),
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
                    case "died" if is_open:
                        self._add_failure(name, path, cases[at], event["error"])
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
            starts = (*starts, _start(row, up))
        self._keep(rows=(*self._found.rows, row), starts=starts)

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
            setup=self._options.setup,
            cases=tuple(cases),
            started=0.0,
        )

    def _keep(self, **changes: Any) -> None:
        self._found = dataclasses.replace(self._found, **changes)
        if self._found.rows:
            self._found.save(self._options.output / FILE)


def _start(row: Row, up: dict[str, Any]) -> Start:
    """How a process came up, of which this is the first row."""
    return Start(
        backend=row.backend,
        path=row.path,
        device=up["device"],
        versions=up["versions"],
        imports_s=up["imports_s"],
        model_s=row.model_s or 0.0,
        first_s=row.first_s,
        second_s=row.second_s,
    )


def _backends(text: str | None) -> list[str]:
    """Raises a ValueError for a list of anything but backends that are installed."""
    if text is None:
        return backends.choose(None)
    names = list(dict.fromkeys(word.strip() for word in text.split(",")))
    if unknown := [name for name in names if name not in ("jax", "torch")]:
        raise ValueError(f"backend: expected a list of jax and torch, got {unknown[0]!r}")
    for name in names:
        backends.choose(name)  # type: ignore[arg-type]
    return names


def _plain(options: Options) -> dict[str, Any]:
    """The options that say what was measured, as JSON has them."""
    left_out = ("output", "overwrite", "report", "page")
    given = dataclasses.asdict(options)
    return {name: value for name, value in given.items() if name not in left_out}
