"""A folder that is there in full or not at all.

It is written beside its place under a hidden name, and moved there once everything is on disk.
Killed half-way, the hidden folder is left, which nothing takes for a checkpoint and the next run
to the same place removes.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_SPARE = 64 << 20  # bytes beside the tensors: headers, assets, a file system's own


def check_place(path: Path, source: Path | None, *, overwrite: bool) -> None:
    """Whether an output may be written there.

    Args:
        path: the folder to be.
        source: what is read meanwhile, and must not be replaced; None where it is not on a disk.
        overwrite: whether what is there now may be replaced.

    Raises:
        FileExistsError: something is there.
        ValueError: it would replace the source.
    """
    if source is not None and (path == source or path in source.parents):
        raise ValueError(f"output_path: expected a place outside of {source}, got {path}")
    if not path.exists() or overwrite:
        return
    if not path.is_dir() or any(path.iterdir()):
        raise FileExistsError(f"output_path: expected nothing there, or --overwrite; got {path}")


def check_space(path: Path, size: int) -> None:
    """Whether a file system holds so many bytes more.

    Raises:
        OSError: it does not.
    """
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < size + _SPARE:
        raise OSError(
            f"output_path: expected {_gigabytes(size + _SPARE)} free for {path}, "
            f"got {_gigabytes(free)}"
        )


@contextlib.contextmanager
def folder_in_full(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """The folder to write into; at the end it is moved to `path`, or removed if that failed.

    Raises:
        OSError: it cannot be written; what was at `path` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.incomplete")
    with _locked(path):
        _remove(partial)
        partial.mkdir()
        try:
            yield partial
            _replace(partial, path, overwrite=overwrite)
        finally:
            _remove(partial)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds off other runs to the same place, until this one ends, however it ends."""
    lock = path.with_name(f".{path.name}.lock")
    file = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(f"output_path: another run is writing {path}") from error
        yield
        lock.unlink(missing_ok=True)
    finally:
        os.close(file)


def _replace(new: Path, path: Path, *, overwrite: bool) -> None:
    if not (overwrite and path.exists()):
        new.rename(path)  # an empty folder gives way, anything else is an error
        return
    old = path.with_name(f".{path.name}.replaced")
    _remove(old)
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
