"""A folder that is there in full or not at all.

It is written beside its place under a hidden name, and moved there once everything is on disk.
What was there before is moved aside for that moment. A run that is killed leaves hidden folders,
which nothing takes for a checkpoint; the next run to the same place puts that in order.
"""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_SPARE = 64 << 20  # bytes beside the tensors: headers, assets, a file system's own
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_place(path: Path, source: Path | None, *, overwrite: bool) -> None:
    """Whether an output may be written there.

    Args:
        path: the folder to be, without links.
        source: what is read meanwhile, and must not be replaced; None where it is not on a disk.
        overwrite: whether what is there now may be replaced.

    Raises:
        FileExistsError: something is there.
        ValueError: it would replace the source, or cannot be moved into its place.
    """
    for taken in () if source is None else (source, source.resolve()):
        if path == taken or path in taken.parents or taken in path.parents:
            raise ValueError(f"output_path: expected a place outside of {source}, got {path}")
    if path in (here := Path.cwd(), *here.parents):
        raise ValueError(f"output_path: expected a folder below {here} or elsewhere, got {path}")
    if os.path.ismount(path):
        raise ValueError(
            f"output_path: expected a folder that can be moved into place, got {path}, where a "
            f"file system is mounted: name a folder in it"
        )
    _check_free(path, overwrite=overwrite)


def _check_free(path: Path, *, overwrite: bool) -> None:
    if overwrite or not os.path.lexists(path):
        return
    if not path.is_dir() or any(path.iterdir()):
        raise FileExistsError(f"output_path: expected nothing there, or --overwrite; got {path}")


def check_space(path: Path, size: int) -> None:
    """Whether a file system holds so many bytes more.

    Raises:
        OSError: it does not, or there can be no folder.
    """
    existing = next(parent for parent in path.parents if os.path.lexists(parent))
    if not existing.is_dir():
        raise NotADirectoryError(f"output_path: expected a folder above {path}, got {existing}")
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
    with _folders_above(path), locked(path):
        _settle(path)
        _check_free(path, overwrite=overwrite)
        partial, replaced = _hidden(path)
        try:
            partial.mkdir()
            yield partial
            _sync(partial)
            if overwrite and os.path.lexists(path):
                path.rename(replaced)
            partial.rename(path)  # an empty folder gives way, anything else is an error
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise OSError(f"output_path: expected room to write {path}, got {error}") from error
        finally:
            _settle(path)


def settle(path: Path) -> None:
    """Leaves what is whole at a place, and nothing that a killed process hid beside it.

    Raises:
        FileExistsError: another process is writing there.
    """
    with locked(path):
        _settle(path)


def _sync(folder: Path) -> None:
    """Waits until all files of a folder are on disk, with their names."""
    for path in (*(path for path in folder.rglob("*") if not path.is_symlink()), folder):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def _hidden(path: Path) -> tuple[Path, Path]:
    """What is being written, and what is being replaced."""
    return path.with_name(f".{path.name}.incomplete"), path.with_name(f".{path.name}.replaced")


def _settle(path: Path) -> None:
    """Leaves what is whole, at its place, and nothing beside it."""
    partial, replaced = _hidden(path)
    if os.path.lexists(replaced) and not os.path.lexists(path):
        replaced.rename(path)
    _remove(replaced)
    _remove(partial)


@contextlib.contextmanager
def _folders_above(path: Path) -> Iterator[None]:
    """Makes the folders that lack; takes them away again if nothing comes to stand in them."""
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for parent in missing:
                parent.rmdir()
        raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds off other runs to the same place, until this one ends, however it ends.

    Raises:
        FileExistsError: another one is there.
    """
    lock = path.with_name(f".{path.name}.lock")
    with _explained(path):
        file = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        if not _take(file, lock):
            raise FileExistsError(f"output_path: another run is writing {path}")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(file)


def _take(file: int, lock: Path) -> bool:
    """Whether the lock is ours now. Not if its file is one that another run has just removed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return lock.exists() and os.path.samestat(os.fstat(file), lock.stat())


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(f"output_path: expected to be able to write {path}, got {error}") from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
