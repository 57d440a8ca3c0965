"""`pruner compare RUN_A RUN_B`: two runs' curves, and where and by how much they part."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tyro
from jaxtyping import Float, Int
from rich import box
from rich.console import Console
from rich.table import Table

from pruner_run.metrics import FILE

_THRESHOLDS = (1e-9, 1e-6, 1e-4, 1e-2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Compare the metrics of two runs, step by step, and plot their curves.

    Attributes:
        runs: the folders of the two, or their metrics.jsonl.
        metric: what is plotted, and compared first.
        output: the picture.
    """

    runs: tyro.conf.Positional[tuple[Path, Path]]
    metric: str = "loss"
    output: Path = Path("comparison.png")


@dataclasses.dataclass(frozen=True)
class Curves:
    """A run's metrics at the steps that both runs made.

    Attributes:
        steps: their numbers.
        values: of each metric that both runs have.
    """

    steps: Int[np.ndarray, "S"]
    values: Mapping[str, Float[np.ndarray, "S"]]


def run(options: Options) -> None:
    """Prints where the runs part, and draws the picture.

    Raises:
        FileNotFoundError: a run has no metrics.
        ValueError: the runs have no step, or not the metric, in common.
    """
    first, second = curves(*options.runs)
    if options.metric not in first.values:
        known = ", ".join(first.values)
        raise ValueError(f"metric: expected one of {known}; got {options.metric!r}")
    console = Console(highlight=False)
    console.print(f"{len(first.steps)} steps in common, {first.steps[0]} to {first.steps[-1]}")
    console.print(_table(first, second))
    draw(options, first, second)
    console.print(f"Wrote {options.output}", soft_wrap=True)


def curves(first: Path, second: Path) -> tuple[Curves, Curves]:
    """Both runs' metrics at their common steps.

    Raises:
        FileNotFoundError: a run has no metrics.
        ValueError: they have no step in common, or a line is no metrics.
    """
    runs = [read(path) for path in (first, second)]
    steps = sorted(runs[0].keys() & runs[1].keys())
    if not steps:
        raise ValueError(f"runs: expected steps in common, got none in {first} and {second}")
    names = [name for name in runs[0][steps[0]] if name in runs[1][steps[0]]]
    found = []
    for each in runs:
        values = {name: np.array([each[step][name] for step in steps]) for name in names}
        found.append(Curves(np.array(steps), values))
    return found[0], found[1]


def read(path: Path) -> dict[int, dict[str, float]]:
    """The metrics of a run by step.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a line is damaged.
    """
    path = path / FILE if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a run's metrics, got none")
    found = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            values = json.loads(line)
            found[values.pop("step")] = values
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}:{number}: expected a step's metrics, got {line!r}") from error
    return found


def relative_differences(
    first: Float[np.ndarray, "S"], second: Float[np.ndarray, "S"]
) -> Float[np.ndarray, "S"]:
    """Of each step, over the larger of the two values."""
    scale = np.maximum(np.maximum(np.abs(first), np.abs(second)), 1e-30)
    return np.abs(first - second) / scale


def parting(differences: Float[np.ndarray, "S"], threshold: float) -> int | None:
    """The place of the first difference above a threshold; NaN is above all."""
    above = np.flatnonzero(~(differences <= threshold))
    return int(above[0]) if above.size else None


def _table(first: Curves, second: Curves) -> Table:
    title = "Relative differences: the largest, and the first step with one above"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for column in ("largest", "at step", *(f"{threshold:g}" for threshold in _THRESHOLDS)):
        table.add_column(column, justify="right")
    for name in first.values:
        differences = relative_differences(first.values[name], second.values[name])
        largest = int(np.argmax(np.where(np.isnan(differences), np.inf, differences)))
        places = [parting(differences, threshold) for threshold in _THRESHOLDS]
        froms = ["never" if place is None else str(first.steps[place]) for place in places]
        row = (f"{differences[largest]:.1e}", str(first.steps[largest]), *froms)
        table.add_row(name, *row)
    return table


def draw(options: Options, first: Curves, second: Curves) -> None:
    """The metric's two curves, and their difference below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for path, each in zip(options.runs, (first, second), strict=True):
        above.plot(each.steps, each.values[options.metric], label=str(path), linewidth=1)
    above.set_ylabel(options.metric)
    above.legend(fontsize="small")
    differences = relative_differences(first.values[options.metric], second.values[options.metric])
    below.semilogy(first.steps, np.maximum(differences, 1e-17), linewidth=1, color="black")
    below.set_ylabel("relative difference")
    below.set_xlabel("step")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=120)
