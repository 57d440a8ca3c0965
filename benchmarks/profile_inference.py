"""Where the time of a call goes: the kernels that a GPU ran, by what each took in all.

    python -m benchmarks.profile_inference --backend torch --keep implicit
    python -m benchmarks.profile_inference --backend jax --keep none --prompt 200

A profile of three calls of the fast way, with random weights, as CUPTI tells it to PyTorch's or
JAX's profiler; beside it the median of calls that nobody watches, and of their stages. What a call
takes beyond its kernels is launches, gaps and the host.
"""

import collections
import dataclasses
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from pruner_run import backend as backends
from pruner_run.bench_cases import Case, Setup, inputs

_WATCHED = 3  # calls
_LINES = 40  # of the table

Kernel = tuple[str, float]  # its name, and µs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Profile a call.

    Attributes:
        backend: which.
        keep: "none", "implicit" or a budget a camera.
        prompt: tokens.
        cameras: that there are.
        batch: samples.
        calls: that are timed.
        output: file for the numbers, as JSON; a list, to which a call is added.
    """

    backend: Literal["torch", "jax"]
    keep: str = "implicit"
    prompt: int = 50
    cameras: int = 3
    batch: int = 1
    calls: int = 40
    output: Path | None = None


def main() -> None:
    """Prints a table, and writes it as JSON."""
    options = tyro.cli(Options, use_underscores=True)
    case = Case(
        keep=options.keep, prompt=options.prompt, cameras=options.cameras, batch=options.batch
    )
    row = measured(options.backend, case, options.calls)
    show(row)
    if options.output is not None:
        before = json.loads(options.output.read_text()) if options.output.exists() else []
        options.output.write_text(json.dumps([*before, row], indent=1) + "\n")


def measured(name: str, case: Case, calls: int) -> dict[str, Any]:
    """What was measured of a case.

    Raises:
        ValueError: there is no GPU.
    """
    setup, probe = Setup(), backends.probe(name)
    if probe.device != "cuda":
        raise ValueError(f"backend: expected a GPU for {name}, got {probe.device!r}")
    model = backends.load(name).model(setup.model_config(case), None, fast=True)
    observation, noise = inputs(case, setup)
    model.sample_actions(observation, noise, case.num_steps)
    call = model.prepared(observation, noise, case.num_steps)
    watch = {"torch": watched_by_torch, "jax": watched_by_jax}[name]
    return {
        "backend": name,
        "case": dataclasses.asdict(case),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": probe.name,
        "versions": dict(probe.versions),
        "p50_ms": median_ms(call, calls),
        "stages_ms": model.stages(observation, noise, case.num_steps),
        "kernels": summed(watch(call), _WATCHED),
    }


def median_ms(call: Callable[[], Any], calls: int) -> float:
    """Of calls that are waited for, after a few."""
    seconds = []
    for _ in range(5 + calls):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds[5:])


def watched_by_torch(call: Callable[[], Any]) -> list[Kernel]:
    """The kernels of a few calls."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(_WATCHED):
            call()
    events = found.events() or []
    of_gpu = (each for each in events if each.device_type == torch.autograd.DeviceType.CUDA)
    return [(each.name, each.time_range.elapsed_us()) for each in of_gpu]


def watched_by_jax(call: Callable[[], Any]) -> list[Kernel]:
    """The kernels of a few calls."""
    import jax
    from jax.profiler import ProfileData  # pyright: ignore[reportAttributeAccessIssue]

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(_WATCHED):
                call()
        (file,) = Path(folder).rglob("*.xplane.pb")
        return [
            (event.name, event.duration_ns / 1e3)
            for plane in ProfileData.from_file(str(file)).planes
            if "GPU" in plane.name
            for line in plane.lines
            if "Stream" in line.name
            for event in line.events
        ]


def summed(kernels: Iterable[Kernel], calls: int) -> list[dict[str, Any]]:
    """By name: how often a call launches it, and the µs that it takes in all; the longest first."""
    times = collections.defaultdict(list)
    for name, us in kernels:
        times[name].append(us)
    rows = [
        {"name": name, "launches": len(each) / calls, "us": sum(each) / calls}
        for name, each in times.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])


def show(row: dict[str, Any]) -> None:
    """Prints a table."""
    kernels, console = row["kernels"], Console()
    took = (
        f"{row['p50_ms']:.2f} ms a call, {sum(each['us'] for each in kernels) / 1e3:.2f} of it in"
    )
    title = f"{row['backend']}, {Case(**row['case']).title}: {took} kernels"
    table = Table("µs", "launches", "µs each", "kernel", title=title)
    for each in kernels[:_LINES]:
        us, launches = each["us"], each["launches"]
        table.add_row(f"{us:.1f}", f"{launches:.1f}", f"{us / launches:.2f}", each["name"][:100])
    console.print(table)
    console.print({name: round(ms, 2) for name, ms in row["stages_ms"].items()})


if __name__ == "__main__":
    main()
