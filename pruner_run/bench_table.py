"""The tables of `pruner bench`: the same cells for the terminal and for the page."""

import dataclasses
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from pruner_run.bench_cases import IMPLICIT, UNPRUNED
from pruner_run.bench_results import LEAST_COSINE, MOST_RATIO, Accuracy, Results, Row, Start

_GIB = 2**30
_STAGES = ("vision", "pruning", "prefix", "denoising", "host")
# Of a case, as they are called in a table.
_AXES = {
    "cameras": "cameras",
    "prompt": "prompt",
    "keep": "keep",
    "batch": "batch",
    "horizon": "horizon",
    "steps": "num_steps",
}


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        title: above it.
        columns: their heads.
        rows: their cells, as many as there are columns.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def grids(results: Results) -> list[Grid]:
    """All tables of a run."""
    found = [
        latencies(results),
        splits(results),
        accuracies(results),
        starts(results),
        failures(results),
    ]
    return [grid for grid in found if grid.rows]


def latencies(results: Results) -> Grid:
    """A row a case: how long its calls take, and how far that is from the floor."""
    axes = varying(results.rows)
    columns = (
        "calls",
        "kept",
        "prefix",
        "p50",
        "p90",
        "p99",
        "min",
        "NumPy p50",
        "floor",
        "× floor",
    )
    return Grid(
        f"A call in ms, inputs and actions on the device{_common(results.rows)}",
        ("backend", *axes, *columns, "GiB", "warm-up s"),
        [(*_case(row, axes), *_latency(row)) for row in results.rows],
    )


def splits(results: Results) -> Grid:
    """A row a case whose stages were timed: where the time goes."""
    axes = varying(results.rows)
    rows = [
        (*_case(row, axes), *(f"{row.stages_ms[name]:.2f}" for name in _STAGES), _share(row))
        for row in results.rows
        if row.stages_ms is not None
    ]
    title = "Where its p50 goes: the stages, each alone, and the host, which is the rest"
    return Grid(title, ("backend", *axes, *_STAGES, "pruning's share"), rows)


def accuracies(results: Results) -> Grid:
    """A row a case whose actions were held to the reference's."""
    axes = varying(results.rows)
    columns = ("samples", "cosine", "plain's", "distance", "plain's", "ratio")
    rows = [
        (*_case(row, axes), *_accuracy(row.accuracy))
        for row in results.rows
        if row.accuracy is not None
    ]
    return Grid(
        "Actions against a float32 reference with the same patches, and the plain path's: cosine "
        f"(the least; expected {LEAST_COSINE:g}), relative distance (a mean; ratio expected at "
        f"most {MOST_RATIO:g})",
        ("backend", *axes, *columns, "holds", "same kept", "plain's"),
        rows,
    )


def varying(rows: Sequence[Row]) -> list[str]:
    """The axes along which cases differ, as a table calls them."""
    return [name for name in _AXES if len({_entry(row, name) for row in rows}) > 1]


def starts(results: Results) -> Grid:
    """How processes came up."""
    imports = ("python", "framework", "project")
    calls = ("first call", "first action", "second call")
    place = results.options.get("checkpoint")
    weights = "weights are drawn, not read" if place is None else f"weights of {place}"
    return Grid(
        f"Seconds from a process' start to its first action; {weights}",
        ("backend", "start", *imports, "reading", "placing", *calls),
        [_start(start) for start in results.starts],
    )


def failures(results: Results) -> Grid:
    """What could not be measured."""
    rows = [
        (
            f"{failure.backend} {failure.path}",
            "all" if failure.case is None else failure.case.title,
            failure.error,
        )
        for failure in results.failures
    ]
    return Grid("Failed", ("backend", "case", "why"), rows)


def ceilings(results: Results) -> str:
    """The device's, in words."""
    if results.ceilings is None:
        return "The device's ceilings could not be measured: no floor."
    bandwidth, rate = results.ceilings.bandwidth / 1e12, results.ceilings.rate / 1e12
    products = ", ".join(
        f"{2 * int(side) ** 3 / ms / 1e9:.3g} at {side}³" for side, ms in results.products.items()
    )
    return (
        f"Ceilings: copy {bandwidth:.2f} TB/s (read + written), {results.options['dtype']} product "
        f"{rate:.3g} TFLOP/s ({products})"
    )


def show(console: Console, results: Results) -> None:
    """Prints the tables."""
    for grid in grids(results):
        table = Table(title=grid.title, box=box.SIMPLE_HEAD, title_justify="left")
        for column in grid.columns:
            is_text = column in ("backend", "case", "why")
            table.add_column(column, justify="left" if is_text else "right", overflow="fold")
        for cells in grid.rows:
            table.add_row(*cells)
        console.print(table)
    if results.rows:
        console.print(ceilings(results))


def _entry(row: Row, axis: str) -> str:
    entry = str(getattr(row.case, _AXES[axis]))
    return {UNPRUNED: "all", IMPLICIT: "votes"}.get(entry, entry)


def _case(row: Row, axes: Sequence[str]) -> tuple[str, ...]:
    return (f"{row.backend} {row.path}", *(_entry(row, axis) for axis in axes))


def _common(rows: Sequence[Row]) -> str:
    """What cases do not differ in."""
    axes = [axis for axis in _AXES if axis not in varying(rows)]
    return "".join(f", {axis} {_entry(row, axis)}" for row in rows[:1] for axis in axes)


def _latency(row: Row) -> tuple[str, ...]:
    times = [f"{row.device_ms[name]:.2f}" for name in ("p50", "p90", "p99", "min")]
    floor = None if row.floor_ms is None else row.floor_ms["total"]
    peak = row.peak_bytes.get("allocated", row.peak_bytes.get("resident"))
    return (
        f"{row.calls}",
        f"{row.kept:g}",
        f"{row.prefix_length}",
        *times,
        f"{row.numpy_ms['p50']:.2f}",
        "" if floor is None else f"{floor:.2f}",
        "" if floor is None else f"{row.device_ms['p50'] / floor:.2f}",
        "" if peak is None else f"{peak / _GIB:.2f}",
        f"{row.warm_up_s:.1f}",
    )


def _share(row: Row) -> str:
    assert row.stages_ms is not None
    return f"{row.stages_ms['pruning'] / row.device_ms['p50']:.1%}"


def _accuracy(found: Accuracy) -> tuple[str, ...]:
    both = (found.path, found.plain)
    kept = ("" if each.same_kept is None else f"{each.same_kept:.1%}" for each in both)
    return (
        f"{len(found.path.cosine)}",
        *(f"{min(each.cosine):.6f}" for each in both),
        *(f"{each.mean_distance:.2e}" for each in both),
        f"{found.ratio:.3f}",
        "yes" if found.holds else "no",
        *kept,
    )


def _start(start: Start) -> tuple[str, ...]:
    imports = (start.imports_s[name] for name in ("python", "framework", "project"))
    reading = start.reading_s
    return (
        f"{start.backend} {start.path}",
        f"{start.number}",
        *(f"{each:.2f}" for each in imports),
        "" if reading is None else f"{reading:.2f}",
        f"{start.model_s - (reading or 0.0):.2f}",
        *(f"{each:.2f}" for each in (start.first_s, start.ready_s, start.second_s)),
    )
