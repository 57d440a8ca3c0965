"""What `pruner bench` found, and its file."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pruner_run.bench_cases import Case
from pruner_run.files import write_atomically
from pruner_run.roofline import Ceilings

FILE = "results.json"
FORMAT = 1  # of the file; a reader refuses others


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One case in one backend, by one path.

    Attributes:
        backend: its name.
        path: "plain" or "fast".
        case: what was measured.
        kept: patches a sample, of all cameras; a mean.
        kept_per_camera: the same by camera, of a model that prunes.
        prefix_length: tokens of the prefix that ran, padding counted.
        model_s: seconds in which the model got its weights; None where a row before had it.
        first_s, second_s: seconds of the first two calls, in which a path gets ready.
        warm_up_s: seconds of all calls before those that are timed.
        device_ms: of a call whose inputs and actions stay on the device: "p50", "p90" ...
        numpy_ms: of a call from NumPy to NumPy.
        stages_ms: "vision", "pruning", "prefix", "denoising", and "host", the rest of the device
            call; None where they were not measured.
        peak_bytes: the most memory taken, by kind.
        floor_ms: of each phase, and "total"; None where the device was not measured.
        operations: of a call's products, as the floor counts them.
    """

    backend: str
    path: str
    case: Case
    kept: float
    kept_per_camera: Mapping[str, float]
    prefix_length: int
    model_s: float | None
    first_s: float
    second_s: float
    warm_up_s: float
    device_ms: Mapping[str, float]
    numpy_ms: Mapping[str, float]
    stages_ms: Mapping[str, float] | None
    peak_bytes: Mapping[str, int]
    floor_ms: Mapping[str, float] | None = None
    operations: float | None = None

    @property
    def prefix(self) -> float:
        """Tokens of the prefix, padding not counted."""
        return self.kept + self.case.prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """How a backend's process came up.

    Attributes:
        backend: its name.
        path: "plain" or "fast".
        device: its name.
        versions: of the framework and what belongs to it.
        imports_s: seconds from the process' start until framework and device are there.
        model_s: seconds until the model has its weights, which are drawn on the device.
        first_s, second_s: seconds of its first two calls.
    """

    backend: str
    path: str
    device: str
    versions: Mapping[str, str]
    imports_s: float
    model_s: float
    first_s: float
    second_s: float

    @property
    def ready_s(self) -> float:
        """Seconds from the process' start to the first actions."""
        return self.imports_s + self.model_s + self.first_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """What could not be measured, and why; `case` is None where it was the backend as a whole."""

    backend: str
    path: str
    case: Case | None
    error: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """A run's findings.

    Attributes:
        date: when it began, in UTC.
        host: Python and the machine.
        options: the run's, as they were given.
        ceilings: of the device; None where it could not be measured.
        products: milliseconds of products, by size, from which the ceiling is taken.
        complete: whether the run came to its end.
    """

    date: str
    host: Mapping[str, str]
    options: Mapping[str, Any]
    ceilings: Ceilings | None = None
    products: Mapping[str, float] = dataclasses.field(default_factory=dict)
    starts: Sequence[Start] = ()
    rows: Sequence[Row] = ()
    failures: Sequence[Failure] = ()
    complete: bool = False

    def save(self, path: Path) -> None:
        """Writes them, in full or not at all."""
        data = {"format": FORMAT} | dataclasses.asdict(self)
        write_atomically(path, (json.dumps(data, indent=1) + "\n").encode())


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds: "min", and the 50th, 90th and 99th of a hundred."""
    values = 1e3 * np.asarray(seconds)
    of_hundred = {f"p{each}": float(np.percentile(values, each)) for each in (50, 90, 99)}
    return of_hundred | {"min": float(values.min())}


def read(path: Path) -> Results:
    """The results of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds no results.
    """
    try:
        data = json.loads(path.read_text())
        if (found := data.pop("format")) != FORMAT:
            raise ValueError(f"format {found!r}")
        return _results(data)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected results of `pruner bench` in format {FORMAT}, got {error}"
        ) from error


def _results(data: dict[str, Any]) -> Results:
    def cased(entry: dict[str, Any]) -> dict[str, Any]:
        return entry | {"case": None if entry["case"] is None else Case(**entry["case"])}

    ceilings = data["ceilings"]
    return Results(
        **data
        | {
            "ceilings": None if ceilings is None else Ceilings(**ceilings),
            "starts": tuple(Start(**each) for each in data["starts"]),
            "rows": tuple(Row(**cased(each)) for each in data["rows"]),
            "failures": tuple(Failure(**cased(each)) for each in data["failures"]),
        }
    )
