"""safetensors files, read and written a part at a time.

The library reads and writes whole tensors, on this machine's disks alone, and saves a file in one
call. A file is a header's length, the header in JSON, and the tensors' bytes without a gap.

Source: the format's description in the documentation of `safetensors`.
"""

import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from convert.lazy_array import LazyArray

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BF16": ml_dtypes.bfloat16,
        "F16": np.float16,
        "F32": np.float32,
        "F64": np.float64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "BOOL": np.bool_,
        "I8": np.int8,
        "I16": np.int16,
        "I32": np.int32,
        "I64": np.int64,
        "U8": np.uint8,
    }.items()
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # bytes, as in the library
_MOST_READ = 64 << 20  # bytes at a time of a stream
_MOST_CACHED = 128 << 20  # bytes of a file being written that the system holds in memory


class Tensor(NamedTuple):
    """What a header says of a tensor: where its bytes begin and end, counted from the file's."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def open_safetensors(path: epath.Path) -> dict[str, LazyArray]:
    """The tensors of a file by name.

    Raises:
        ValueError: it is no safetensors file, or a broken one.
    """
    return {name: _lazy(path, name, tensor) for name, tensor in _tensors(path).items()}


def metadata(path: epath.Path) -> dict[str, str]:
    """The free text entries of a file's header."""
    return _header(path)[0].get("__metadata__", {})


def _tensors(path: epath.Path) -> dict[str, Tensor]:
    header, data = _header(path)
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            found[name] = _tensor(path, name, entry, data)
    expected = data
    for name, tensor in sorted(found.items(), key=lambda item: item[1][2:]):
        if tensor.begin != expected:
            raise _broken(path, f"{name} at byte {tensor.begin}, not at {expected}")
        expected = tensor.end
    size = path.stat().length
    if size != expected:
        raise _broken(path, f"{size} bytes where the header says {expected}")
    return found


def _header(path: epath.Path) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors' bytes begin."""
    size = path.stat().length
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(_LARGEST_HEADER, size - 8):
            raise _broken(path, f"{size} bytes that do not begin with a header")
        text = file.read(length)
    try:
        header = json.loads(text)
    except ValueError as error:
        raise _broken(path, f"a header that is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _broken(path, f"a header that is a {type(header).__name__}")
    return header, 8 + length


def _tensor(path: epath.Path, name: str, entry: Any, data: int) -> Tensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not all(type(size) is int and size >= 0 for size in (*shape, begin, end)):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(path, f"{name} described as {entry!r}") from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{path}: {name}: expected a dtype of {sorted(DTYPES)}, got {dtype}")
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise _broken(path, f"{name} of {dtype} {list(shape)} in {end - begin} bytes")
    return Tensor(DTYPES[dtype], tuple(shape), data + begin, data + end)


def _broken(path: epath.Path, found: str) -> ValueError:
    return ValueError(f"{path}: expected a safetensors file, got {found}")


def _lazy(path: epath.Path, name: str, tensor: Tensor) -> LazyArray:
    row = (tensor.end - tensor.begin) // max(1, tensor.shape[0]) if tensor.shape else 0

    def fill(array: np.ndarray, begin: int) -> np.ndarray:
        with path.open("rb") as file:
            file.seek(begin)
            _read_into(path, name, file, array)
        return array

    def read(index: Any) -> np.ndarray:
        if index is ...:
            return fill(np.empty(tensor.shape, tensor.dtype), tensor.begin)
        start, stop, step = _rows(index, tensor.shape[0])
        rows = np.empty((max(0, stop - start), *tensor.shape[1:]), tensor.dtype)
        rows = fill(rows, tensor.begin + start * row)
        return rows[0] if isinstance(index, int) else rows[::step]

    def stream(rows: int) -> Iterator[np.ndarray]:
        return _stream(path, name, tensor, rows)

    def whole(array: np.ndarray) -> None:
        fill(array, tensor.begin)

    return LazyArray(tensor.shape, tensor.dtype, read, stream, fill=whole)


def _rows(index: int | slice, length: int) -> tuple[int, int, int]:
    if isinstance(index, slice):
        start, stop, step = index.indices(length)
        assert step > 0
        return start, stop, step
    start = range(length)[index]
    return start, start + 1, 1


def _stream(path: epath.Path, name: str, tensor: Tensor, rows: int) -> Iterator[np.ndarray]:
    length = tensor.shape[0]
    row = (tensor.end - tensor.begin) // max(1, length)
    rows = max(1, min(rows, length, _MOST_READ // max(1, row)))
    buffers = [np.empty((rows, *tensor.shape[1:]), tensor.dtype) for _ in range(2)]
    with path.open("rb") as file:
        file.seek(tensor.begin)
        for turn, start in enumerate(range(0, length, rows)):
            piece = buffers[turn % 2][: length - start]
            _read_into(path, name, file, piece)
            yield piece


def _read_into(path: epath.Path, name: str, file: Any, array: np.ndarray) -> None:
    view, done = array.reshape(-1).view(np.uint8).data, 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise _broken(path, f"{name} cut off {len(view) - done} bytes before its end")
        done += count


class SafetensorsFile:
    """A file being written: every byte has its place from the start, in any order.

    Bytes that are never written are zeros, and take no place on disk. As the library does, widest
    dtypes come first, then names in order, so that a file is the same however it came about.

    Args:
        path: where it is to be; there must be nothing.
        tensors: dtype and shape by name.
        metadata: free text entries of the header.
    """

    def __init__(
        self,
        path: os.PathLike[str],
        tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str],
    ) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name in in_order(tensors):
            dtype, shape = tensors[name]
            begin, end = end, end + size_of(dtype, shape)
            header[name] = {
                "dtype": _NAMES[np.dtype(dtype)],
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._begins = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in tensors}
        self._cached, self._lock = 0, threading.Lock()
        self._file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        os.ftruncate(self._file, 8 + len(text) + end)
        self._write(0, len(text).to_bytes(8, "little") + text)

    def write(self, name: str, offset: int, data: np.ndarray) -> None:
        """Writes contiguous bytes at an offset into a tensor. Threads may write side by side."""
        self._write(self._begins[name] + offset, data.reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        """Closes the file; it may not be on disk yet, see `convert.output.folder_in_full`."""
        os.close(self._file)

    def _write(self, place: int, data: Any) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._file, view, place)
            view, place = view[count:], place + count
        self._uncache(len(data))

    def _uncache(self, count: int) -> None:
        """Now and then, lets the system forget what it has on disk: nothing of it is read again.

        It would push all else out of the system's cache and count towards a container's limit. And
        in a virtual machine, memory that was used before is much faster than what the host gives.
        """
        with self._lock:
            self._cached += count
            if self._cached < _MOST_CACHED:
                return
            self._cached = 0
        os.fdatasync(self._file)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)


def in_order(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> list[str]:
    """The names in the order in which a file holds them."""
    return sorted(tensors, key=lambda name: (-np.dtype(tensors[name][0]).itemsize, name))


def size_of(dtype: np.dtype, shape: Iterable[int]) -> int:
    """The bytes of a tensor."""
    return math.prod(shape) * np.dtype(dtype).itemsize
