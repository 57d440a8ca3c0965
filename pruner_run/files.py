"""Files that are there in full or not at all."""

import os
from pathlib import Path


def write_atomically(path: str | Path, data: bytes) -> None:
    """Writes a file beside its place, then moves it there: nobody ever sees half of it.

    Raises:
        OSError: it cannot be written; what was at the path is unchanged.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
