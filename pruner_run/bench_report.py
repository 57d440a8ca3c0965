"""The page of what `pruner bench` found: made from its files, below what is written by hand."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pruner_run import bench_picture, bench_table
from pruner_run.bench_results import FILE, Results, read
from pruner_run.bench_table import Grid
from pruner_run.files import write_atomically
from pruner_run.inference_flags import FLAGS

MARK = "<!-- what follows is generated: pruner bench --report FILE... -->\n"
_HEAD = "# Speed\n\n"
_FULL = ("pi05", "pi0")  # models of full size


def write(files: Sequence[Path], page: Path) -> None:
    """Replaces what stands below a page's mark, and the picture beside the page.

    Args:
        files: of results.
        page: what stands above the mark is kept; a page that is not there begins with a title.

    Raises:
        OSError: a file cannot be read, or the page cannot be written.
        ValueError: a file holds no results, or nothing was measured.
    """
    found = {path: read(path) for path in files}
    by_hand = page.read_text().partition(MARK)[0] if page.exists() else _HEAD
    page.parent.mkdir(parents=True, exist_ok=True)
    picture = page.with_suffix(".png")
    alike = _alike(list(found.values()))
    bench_picture.draw([row for results in alike for row in results.rows], picture)
    parts = [f"![Calls against the floor, and how they grow]({picture.name})\n"]
    parts += [section(path, results) for path, results in found.items()]
    write_atomically(page, (by_hand + MARK + "\n" + "\n".join(parts)).encode())


def section(path: Path, results: Results) -> str:
    """A file's part of the page."""
    name = path.parent.resolve().name if path.name == FILE else path.stem
    lines = [f"## {name}", "", _conditions(path, results), ""]
    for grid in bench_table.grids(results):
        lines += [f"**{grid.title}**", "", *_markdown(grid), ""]
    return "\n".join(lines)


def _conditions(path: Path, results: Results) -> str:
    """When, on what, with what; and whether it says anything of a robot's model."""
    options = results.options
    devices = dict.fromkeys(start.device for start in results.starts)
    versions = {name: text for start in results.starts for name, text in start.versions.items()}
    words = [
        f"{results.date[:10]}, {', '.join(devices)}, Python {results.host['python']}, "
        f"{', '.join(f'{name} {text}' for name, text in versions.items())}. "
        f"Model {options['config']} in {options['dtype']}, {_weights(options)}{_flags(options)}. "
        f"{bench_table.ceilings(results)}. From `{path}`."
    ]
    if not results.complete:
        words.append("The run was broken off: what it had measured by then.")
    if options["config"] not in _FULL or options["device"] != "cuda":
        words.append("**No result: a try of the program, not of a robot's model on a GPU.**")
    return " ".join(words)


def _weights(options: Mapping[str, Any]) -> str:
    place = options["checkpoint"]
    return "random weights" if place is None else f"weights of {place}"


def _flags(options: Mapping[str, Any]) -> str:
    """Of the fast path, those that were given; the oldest files know of none."""
    given = [f"`--{name}`" for name in FLAGS if options.get(name)]
    return ", ".join(["", *given])


def _alike(found: Sequence[Results]) -> list[Results]:
    """Those of the first one's model, flags and device, which one picture can show.

    Raises:
        ValueError: it has no rows.
    """
    first = _kind(found[0])
    if not found[0].rows:
        raise ValueError("report: expected results with rows, got none in the first file")
    return [results for results in found if _kind(results) == first]


def _kind(results: Results) -> tuple[object, ...]:
    devices = sorted({start.device for start in results.starts})
    options = results.options
    return (options["config"], options["dtype"], _flags(options), *devices)


def _markdown(grid: Grid) -> list[str]:
    lines = [grid.columns, ["---"] * len(grid.columns), *grid.rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in lines]
