"""The picture of what `pruner bench` found: calls against the floor, and how they grow."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruner_run.bench_cases import IMPLICIT, UNPRUNED, Case
from pruner_run.bench_results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {
    ("torch", "fast"): "#d1495b",
    ("torch", "plain"): "#e8a5ae",
    ("jax", "fast"): "#2e6f95",
    ("jax", "plain"): "#9cc4dc",
}
_STAGES = {
    "vision": "#4c956c",
    "pruning": "#f4a259",
    "prefix": "#5b8e9d",
    "denoising": "#8d6a9f",
    "host": "#b8b8b8",
}
_MOST_BARS = 5


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Cases that differ along one axis.

    Attributes:
        title: of the axis.
        fields: of `Case`, that make the axis.
    """

    title: str
    fields: Sequence[str]

    def place(self, row: Row) -> float:
        """Where a row stands along the axis."""
        if len(self.fields) > 1:
            return row.prefix
        return getattr(row.case, self.fields[0])


SWEEPS = (
    Sweep("prefix, tokens", ("prompt", "keep")),
    Sweep("cameras", ("cameras",)),
    Sweep("batch", ("batch",)),
    Sweep("denoising steps", ("num_steps",)),
)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draws them.

    Args:
        rows: of one model on one device. Of the same case in the same way the last one counts, of
            those whose stages were timed, where there are any.
        path: of the picture, a PNG.
    """
    from matplotlib.figure import Figure

    in_order = sorted(rows, key=lambda row: row.stages_ms is not None)
    newest = list({(row.backend, row.path, row.case): row for row in in_order}.values())
    figure = Figure(figsize=(16, 12), layout="constrained")
    panels = figure.subplots(3, 2, height_ratios=(1.3, 1, 1)).ravel()
    _bars(panels[0], newest)
    _split(panels[1], newest)
    for panel, sweep in zip(panels[2:], SWEEPS, strict=True):
        _curves(panel, sweep, along(newest, sweep))
    figure.savefig(path, dpi=110, metadata={"Software": None})


def along(rows: Sequence[Row], sweep: Sweep) -> list[Row]:
    """The rows that differ along the axis alone: the most that there are, or none."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        others = dataclasses.asdict(row.case)
        for field in sweep.fields:
            del others[field]
        groups.setdefault(tuple(others.items()), []).append(row)
    best = max(groups.values(), key=lambda group: _extent(group, sweep), default=[])
    return best if _extent(best, sweep)[0] > 1 else []


def _extent(group: Sequence[Row], sweep: Sweep) -> tuple[int, int]:
    return len({sweep.place(row) for row in group}), len(group)


def _curves(panel: "Axes", sweep: Sweep, rows: Sequence[Row]) -> None:
    """A curve a way, and the floor's."""
    panel.set_xlabel(sweep.title)
    panel.set_ylabel("ms")
    if not rows:
        panel.text(0.5, 0.5, "not measured", ha="center", transform=panel.transAxes)
        return
    for way, colour in _COLOURS.items():
        mine = sorted(
            (sweep.place(row), row.device_ms["p50"])
            for row in rows
            if (row.backend, row.path) == way
        )
        if mine:
            _curve(panel, mine, ".-", colour, " ".join(way))
    floors = sorted({(sweep.place(row), _floor(row)) for row in rows if row.floor_ms})
    if floors:
        _curve(panel, floors, "--", "black", "floor")
    panel.set_ylim(bottom=0)
    if len(sweep.fields) == 1:
        panel.set_xticks(sorted({sweep.place(row) for row in rows}))
    panel.set_title(_common(rows[0].case, sweep), fontsize="small")
    panel.legend(fontsize="small")


def _curve(
    panel: "Axes", points: Sequence[tuple[float, float]], style: str, colour: str, label: str
) -> None:
    x, y = zip(*points, strict=True)
    panel.plot(x, y, style, color=colour, label=label)


def _bars(panel: "Axes", rows: Sequence[Row]) -> None:
    """Each setup's p50 in every way, and its floor as a line across the bars."""
    setups = _setups(rows)
    height = 0.8 / len(_COLOURS)
    for place, setup in enumerate(setups):
        for number, (way, colour) in enumerate(_COLOURS.items()):
            for row in rows:
                if row.case == setup and (row.backend, row.path) == way:
                    where = place + (number - 1.5) * height
                    panel.barh(where, row.device_ms["p50"], height, color=colour)
                    panel.text(row.device_ms["p50"], where, f" {row.device_ms['p50']:.1f}")
                    if row.floor_ms:
                        ends = (place - 0.45, place + 0.45)
                        panel.vlines(_floor(row), *ends, color="black", linestyle="--")
    panel.set_yticks(range(len(setups)), [_name(setup) for setup in setups])
    panel.invert_yaxis()
    panel.set_xlim(right=1.1 * panel.get_xlim()[1])  # for the last bar's number
    panel.set_xlabel("ms a call, p50; the floor dashed")
    shown = {(row.backend, row.path) for row in rows}
    ways = {way: colour for way, colour in _COLOURS.items() if way in shown}
    _name_colours(panel, {" ".join(way): colour for way, colour in ways.items()})


def _split(panel: "Axes", rows: Sequence[Row]) -> None:
    """Each setup's stages, one after the other."""
    setups = _setups(rows)
    ways = list(_COLOURS)
    shown = sorted(
        (row for row in rows if row.case in setups and row.stages_ms),
        key=lambda row: (setups.index(row.case), ways.index((row.backend, row.path))),
    )
    for place, row in enumerate(shown):
        left = 0.0
        for stage, colour in _STAGES.items():
            length = max((row.stages_ms or {})[stage], 0.0)
            panel.barh(place, length, 0.8, left=left, color=colour)
            left += length
    names = [f"{_name(row.case)}, {row.backend} {row.path}" for row in shown]
    panel.set_yticks(range(len(shown)), names, fontsize="small")
    panel.invert_yaxis()
    panel.set_xlabel("ms of each stage")
    _name_colours(panel, _STAGES)


def _setups(rows: Sequence[Row]) -> list[Case]:
    """The first few cases of one sample, 3 cameras, and the usual steps, where there are any;
    those whose stages were timed before others."""
    in_order = sorted(rows, key=lambda row: row.stages_ms is None)
    cases = list(dict.fromkeys(row.case for row in in_order))
    usual = Case()
    few = [
        case
        for case in cases
        if (case.batch, case.cameras, case.num_steps)
        == (usual.batch, usual.cameras, usual.num_steps)
    ]
    return (few or cases)[:_MOST_BARS]


def _name(case: Case) -> str:
    kept = {UNPRUNED: "all", IMPLICIT: "votes"}.get(case.keep, f"{case.keep} a camera")
    return f"{kept}, prompt {case.prompt}"


def _common(case: Case, sweep: Sweep) -> str:
    """What the cases of a sweep have in common."""
    words = {
        "keep": f"keep {case.keep}",
        "prompt": f"prompt {case.prompt}",
        "cameras": f"{case.cameras} cameras",
        "batch": f"batch {case.batch}",
        "num_steps": f"{case.num_steps} steps",
    }
    return ", ".join(text for field, text in words.items() if field not in sweep.fields)


def _floor(row: Row) -> float:
    assert row.floor_ms is not None
    return row.floor_ms["total"]


def _name_colours(panel: "Axes", colours: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "frameon": False}
    panel.legend(handles=handles, ncols=len(handles), fontsize="small", **above)
