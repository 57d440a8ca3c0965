"""A checkpoint's weights for `pruner bench`, which tell how long reading them took."""

import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from convert.lazy_array import LazyArray


@dataclasses.dataclass
class Stopwatch:
    """Seconds that were spent on something, so far."""

    seconds: float = 0.0


def clocked(place: str | None) -> tuple["Mapping[str, LazyArray] | None", Stopwatch | None]:
    """A checkpoint's arrays, and what counts the seconds of reading them; None for no checkpoint.

    A backend treats them as it does those that it finds at the path itself.

    Raises:
        FileNotFoundError, ValueError: as `open_checkpoint`.
    """
    if place is None:
        return None, None
    from convert.reading import open_checkpoint  # here: a backend has it, the command needs it not

    watch = Stopwatch()
    started = time.perf_counter()
    arrays = open_checkpoint(place)
    watch.seconds = time.perf_counter() - started
    return {name: _clocked(array, watch) for name, array in arrays.items()}, watch


def forget(place: Path) -> None:
    """Puts the files of a checkpoint out of the system's cache, where the system can.

    They are then read from the disk, or from what the host of a virtual machine holds of it.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    for path in [place, *place.rglob("*")]:
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())  # what is not yet on disk cannot be forgotten
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _clocked(array: "LazyArray", watch: Stopwatch) -> "LazyArray":
    def read(index: Any) -> np.ndarray:
        started = time.perf_counter()
        try:
            return array.read(index)
        finally:
            watch.seconds += time.perf_counter() - started

    return dataclasses.replace(array, read=read, stream=None, fill=None)
