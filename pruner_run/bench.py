"""`pruner bench`: how long a call takes, where its time goes, and how far it is from the floor."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from pruner_run import backend as backends
from pruner_run import bench_cases, bench_report, bench_table, bench_weights
from pruner_run.bench_cases import Case, Setup
from pruner_run.bench_results import FILE, Results
from pruner_run.bench_run import Bench
from pruner_run.inference_flags import InferenceFlags
from pruner_spec.inference import InferenceSettings

_WIDE = 160  # characters of a table that goes into a file
_AXES = ("cameras", "prompt", "keep", "batch", "horizon", "num_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(InferenceFlags):
    """Measure calls of a model with random weights, against the floor of the device.

    Where a list is asked for, its entries are separated by commas, and every choice of one entry a
    list is measured. Writes results.json.

    Attributes:
        backend: a list of jax and torch; all that are installed, if not given.
        device: the GPU, or the CPU.
        path: the way through the model: that which is made for speed, the plain one, or both.
        accuracy: hold the actions to those of a float32 model of the same numbers, and the plain
            path's too. After all that is timed.
        checkpoint: whose weights the model has, of the config's sizes; random ones, if not given.
        starts: processes of each kind, one after the other; all but the first only start.
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
        plain_calls: the same of the plain path, where it is to have fewer.
        no_stages: do not time the stages apart. In JAX that compiles each of them.
        seed: of images, states and noise.
        output: folder for results.json.
        overwrite: replace a results.json that is there.
        report: files of results to make a page of, instead of measuring.
        page: the page. What stands above its mark is kept; a picture is drawn beside it.
    """

    backend: str | None = None
    device: Literal["cuda", "cpu"] = "cuda"
    path: Literal["fast", "plain", "both"] = "fast"
    accuracy: tyro.conf.FlagCreatePairsOff[bool] = False
    checkpoint: Path | None = None
    starts: int = 1
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
    plain_calls: int | None = None
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
            accuracy=self.accuracy,
            seed=self.seed,
            checkpoint=None if self.checkpoint is None else str(self.checkpoint),
            settings=self.settings,
        )

    @property
    def described(self) -> dict[str, Any]:
        """Those that say what was measured, as JSON has them."""
        left_out = ("output", "overwrite", "report", "page")
        given = dataclasses.asdict(self) | {"checkpoint": self.setup.checkpoint}
        return {name: value for name, value in given.items() if name not in left_out}

    def setup_of(self, path: str) -> Setup:
        """The same, for a path. What is said of the fast one holds the plain one beside it."""
        if path != "plain":
            return self.setup
        calls = self.calls if self.plain_calls is None else self.plain_calls
        accuracy = self.accuracy and self.path == "plain"
        return dataclasses.replace(
            self.setup, calls=calls, accuracy=accuracy, settings=InferenceSettings()
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
    _check(options, cases, names)
    path = options.output / FILE
    if path.exists() and not options.overwrite:
        raise FileExistsError(f"output: expected no {path}, or --overwrite")
    options.output.mkdir(parents=True, exist_ok=True)
    paths = ("fast", "plain") if options.path == "both" else (options.path,)
    bench = Bench(options, cases, console)
    bench.measure_ceilings(names)
    for name in names:
        for way in paths:
            if options.checkpoint is not None:
                bench_weights.forget(options.checkpoint)
            bench.measure(name, way)
            for number in range(2, options.starts + 1):
                bench.start_again(name, way, number)
    results = bench.finish()
    bench_table.show(console, results)
    if not results.rows:
        reasons = dict.fromkeys(failure.error for failure in results.failures)
        raise ValueError("; ".join(reasons))
    console.print(f"Wrote {path}")
    return results


def _check(options: Options, cases: Sequence[Case], names: Sequence[str]) -> None:
    """Raises a ValueError or an OSError for what cannot be measured, before anything is."""
    bench_cases.check(cases, options.setup)
    options.check_flags("path", options.path)
    if options.compiled and "jax" in names:
        raise ValueError(f"backend: expected torch alone with --compiled, got {', '.join(names)}")
    for name in ("starts", "plain_calls"):
        number = getattr(options, name)
        if number is not None and number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    if options.checkpoint is not None:
        from convert.reading import locate

        locate(options.checkpoint)


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
