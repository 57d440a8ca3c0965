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
FORMAT = 2  # of the file; a reader refuses others
# What a fast path is held to: of each sample, and over all of them.
LEAST_COSINE, MOST_RATIO = 0.999, 1.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Closeness:
    """How close actions are to the reference's: a number a sample.

    Attributes:
        cosine: of the angle between the two.
        distance: of the two, over the length of the reference's.
        same_kept: of the patches that the reference would keep itself, the share that was kept; a
            mean. None of a model that does not prune.
    """

    cosine: Sequence[float]
    distance: Sequence[float]
    same_kept: float | None

    @property
    def mean_distance(self) -> float:
        """Of all samples."""
        return float(np.mean(self.distance))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracy:
    """A case's actions, and the plain path's in the same dtype, against float32.

    Attributes:
        path: of the path that was measured.
        plain: of the plain one, from the patches that the measured one kept; `same_kept` is of
            those that it would keep itself.
    """

    path: Closeness
    plain: Closeness

    @property
    def ratio(self) -> float:
        """How much farther from the reference the measured path is than the plain one."""
        return self.path.mean_distance / self.plain.mean_distance

    @property
    def holds(self) -> bool:
        """Whether the measured path does no harm."""
        return min(self.path.cosine) >= LEAST_COSINE and self.ratio <= MOST_RATIO


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One case in one backend, by one path.

    Attributes:
        backend: its name.
        path: "plain" or "fast".
        case: what was measured.
        calls: that were timed, of each kind.
        kept: patches a sample, of all cameras; a mean.
        kept_per_camera: the same by camera, of a model that prunes.
        prefix_length: tokens of the prefix that ran, padding counted.
        model_s: seconds in which the model got its weights; None where a row before had it.
        reading_s: those of them in which files were read; None where weights are drawn, too.
        first_s, second_s: seconds of the first two calls, in which a path gets ready.
        warm_up_s: seconds of all calls before those that are timed.
        device_ms: of a call whose inputs and actions stay on the device: "p50", "p90" ...
        numpy_ms: of a call from NumPy to NumPy.
        stages_ms: "vision", "pruning", "prefix", "denoising", and "host", the rest of the device
            call; None where they were not measured.
        peak_bytes: the most memory taken, by kind.
        floor_ms: of each phase, and "total"; None where the device was not measured.
        operations: of a call's products, as the floor counts them.
        accuracy: None where it was not asked for, or could not be found.
    """

    backend: str
    path: str
    case: Case
    calls: int
    kept: float
    kept_per_camera: Mapping[str, float]
    prefix_length: int
    model_s: float | None
    reading_s: float | None
    first_s: float
    second_s: float
    warm_up_s: float
    device_ms: Mapping[str, float]
    numpy_ms: Mapping[str, float]
    stages_ms: Mapping[str, float] | None
    peak_bytes: Mapping[str, int]
    floor_ms: Mapping[str, float] | None = None
    operations: float | None = None
    accuracy: Accuracy | None = None

    @property
    def prefix(self) -> float:
        """Tokens of the prefix, padding not counted."""
        return self.kept + self.case.prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """How a backend's process came up, on the way to the first case's second call.

    Attributes:
        backend: its name.
        path: "plain" or "fast".
        device: its name.
        versions: of the framework and what belongs to it.
        number: 1 for the first process; those that only start follow.
        imports_s: seconds from the process' start until framework and device are there: "python"
            (the interpreter and what needs no framework), "framework", "project".
        reading_s: seconds in which files were read, of `model_s`; None where weights are drawn.
        model_s: seconds until the model has its weights, as its path wants them.
        first_s, second_s: seconds of its first two calls.
    """

    backend: str
    path: str
    device: str
    versions: Mapping[str, str]
    imports_s: Mapping[str, float]
    reading_s: float | None
    model_s: float
    first_s: float
    second_s: float
    number: int = 1

    @property
    def ready_s(self) -> float:
        """Seconds from the process' start to the first actions."""
        return sum(self.imports_s.values()) + self.model_s + self.first_s


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
            "rows": tuple(_row(cased(each)) for each in data["rows"]),
            "failures": tuple(Failure(**cased(each)) for each in data["failures"]),
        }
    )


def _row(data: dict[str, Any]) -> Row:
    found = data["accuracy"]
    read: dict[str, Any] = {"accuracy": None if found is None else accuracy_of(found)}
    return Row(**data | read)


def accuracy_of(data: Mapping[str, Any]) -> Accuracy:
    """From what `dataclasses.asdict` made of it, and JSON left."""
    return Accuracy(**{name: Closeness(**data[name]) for name in ("path", "plain")})
