"""Orbax checkpoints, read chunk by chunk as a stream.

An array is stored as chunks, and openpi's as one chunk, or one a device. TensorStore decodes a
chunk whole, next to its compressed bytes: two to three times an array of 5 GB. Here chunks that
lie beside each other are decompressed in step, so that what is in memory is a few rows.

What has another format than openpi's (zarr 2 or 3, zstd or nothing) is read by TensorStore.
"""

import dataclasses
import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorstore
from etils import epath

from convert import json_file
from convert.lazy_array import LazyArray

# The file that describes an array beside its chunks, and TensorStore's driver for that format.
_ZARR_DRIVERS = {".zarray": "zarr", "zarr.json": "zarr3"}
_BLOCK = 2 << 20  # compressed bytes read at a time, of each chunk


def is_orbax(folder: epath.Path) -> bool:
    """Whether an Orbax checkpoint's own files stand in a folder."""
    if not folder.is_dir():
        return False
    marks = ("_METADATA", "manifest.ocdbt")
    # Not by a pattern, in which a folder's own name may mean something else.
    return any((folder / mark).exists() for mark in marks) or any(
        (array / file).exists() for array in folder.iterdir() for file in _ZARR_DRIVERS
    )


def open_orbax(folder: epath.Path) -> dict[str, LazyArray]:
    """The arrays by name, the parts of a name joined by "/".

    Raises:
        ValueError: it is no Orbax checkpoint, or a broken one.
    """
    try:
        kvstore = tensorstore.KvStore.open(_kvstore(folder)).result()
        keys = [key.decode() for key in kvstore.list().result()]
        specs = dict(_zarr_specs(keys, kvstore.spec().to_json()))
        strict = {"fill_missing_data_reads": not _stores_every_chunk(folder)}
        opening = {
            array: tensorstore.open(spec | strict, read=True) for array, spec in specs.items()
        }
        stores = {array: future.result() for array, future in opening.items()}
        strictly = not strict["fill_missing_data_reads"]
        found = {
            array.replace(".", "/"): _lazy(folder, array, store, kvstore, strictly)
            for array, store in stores.items()
        }
    except ValueError as error:
        got = without_spec(error)
        raise ValueError(f"{folder}: expected an Orbax checkpoint, got {got}") from error
    if not found:
        raise ValueError(f"{folder}: expected an Orbax checkpoint, got one without arrays")
    return found


def without_spec(error: Exception) -> str:
    """What TensorStore says, without all the settings that it says it of."""
    return re.sub(r" \[tensorstore_spec='.*?'\]", "", str(error), flags=re.DOTALL)


def _kvstore(folder: epath.Path) -> Any:
    is_local = "://" not in str(folder)
    base: Any = {"driver": "file", "path": f"{folder}/"} if is_local else f"{folder}/"
    if (folder / "manifest.ocdbt").exists():
        return {"driver": "ocdbt", "base": base, "path": ""}
    return base


def _zarr_specs(keys: Iterable[str], kvstore: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """TensorStore's spec of every array, by the array's path."""
    for key in sorted(keys):
        array, _, file = key.rpartition("/")
        if file in _ZARR_DRIVERS:
            within = kvstore | {"path": f"{kvstore.get('path', '')}{array}/"}
            yield array, {"driver": _ZARR_DRIVERS[file], "kvstore": within}


def _stores_every_chunk(folder: epath.Path) -> bool:
    """Whether a missing chunk is damage; older Orbax left out those with nothing but zeros."""
    metadata = folder / "_METADATA"
    if not metadata.exists():
        return False
    return json_file.read(metadata).get("store_array_data_equal_to_fill_value", False)


def _lazy(folder: epath.Path, array: str, store: Any, kvstore: Any, strict: bool) -> LazyArray:
    """One array."""
    shape, dtype = tuple(store.shape), store.dtype.numpy_dtype
    chunks = tuple(store.chunk_layout.read_chunk.shape or shape)
    stored = _stored(kvstore, array, store)
    name = array.replace(".", "/")

    def explained(error: Exception) -> ValueError:
        return ValueError(f"{folder}: {name}: expected a whole array, got {without_spec(error)}")

    def part(index: Any) -> np.ndarray:
        try:
            return store[index].read().result()
        except ValueError as error:
            raise explained(error) from error

    def stream(rows: int) -> Iterator[np.ndarray]:
        if stored is None:
            return _chunk_rows(part, shape, chunks, rows)
        return _guarded(_decoded(stored, shape, dtype, chunks, rows, strict), explained)

    def read(index: Any) -> np.ndarray:
        if index is not ... or stored is None:
            return part(index)
        whole, done = np.empty(shape, dtype), 0
        for piece in stream(max(1, _BLOCK // max(1, math.prod(shape[1:]) * dtype.itemsize))):
            whole[done : done + len(piece)] = piece
            done += len(piece)
        return whole

    return LazyArray(shape, dtype, read, stream if shape else None, chunks)


def _guarded(pieces: Iterator[np.ndarray], explained: Callable[..., ValueError]) -> Iterator:
    try:
        yield from pieces
    except (ValueError, EOFError) as error:
        raise explained(error) from error


def _chunk_rows(
    part: Callable[[Any], np.ndarray], shape: tuple[int, ...], chunks: tuple[int, ...], rows: int
) -> Iterator[np.ndarray]:
    """Pieces of whole rows of chunks, each decoded once."""
    for start in range(0, shape[0], chunks[0]):
        row = part(slice(start, min(start + chunks[0], shape[0])))
        yield from (row[first : first + rows] for first in range(0, len(row), rows))


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Where an array's chunks are.

    Attributes:
        kvstore: holds them.
        prefix: of their keys.
        separator: between the numbers of a chunk in its key.
        is_compressed: by zstd; else they are the bytes themselves.
    """

    kvstore: Any
    prefix: str
    separator: str
    is_compressed: bool

    def open(self, chunk: tuple[int, ...], strict: bool) -> Any:
        """A file of a chunk's decompressed bytes; of zeros for one that is not there."""
        value = _Value(self.kvstore, self.prefix + self.separator.join(map(str, chunk)))
        if not value.exists():
            if strict:
                raise EOFError(f"no chunk {value.key}")
            return _Zeros()
        if not self.is_compressed:
            return value
        import zstandard

        source: Any = value  # typed as a file on disk, read as any file
        return zstandard.ZstdDecompressor().stream_reader(source, read_size=_BLOCK)


def _stored(kvstore: Any, array: str, store: Any) -> _Stored | None:
    """None for a format that only TensorStore reads."""
    if not store.shape:
        return None
    metadata = store.spec(retain_context=False).to_json()["metadata"]
    prefix = f"{array}/"
    if "compressor" in metadata:
        return _stored_zarr2(kvstore, prefix, metadata)
    return _stored_zarr3(kvstore, prefix, metadata)


def _stored_zarr2(kvstore: Any, prefix: str, metadata: dict[str, Any]) -> _Stored | None:
    compressor = metadata["compressor"]
    if compressor is not None and compressor["id"] != "zstd":
        return None
    if metadata["order"] != "C" or metadata["filters"] or metadata["dtype"].startswith(">"):
        return None
    separator = metadata.get("dimension_separator", ".")
    return _Stored(kvstore, prefix, separator, compressor is not None)


def _stored_zarr3(kvstore: Any, prefix: str, metadata: dict[str, Any]) -> _Stored | None:
    codecs = [codec["name"] for codec in metadata["codecs"]]
    big = any(codec.get("configuration", {}).get("endian") == "big" for codec in metadata["codecs"])
    encoding = metadata["chunk_key_encoding"]
    if codecs not in (["bytes"], ["bytes", "zstd"]) or big or encoding["name"] != "default":
        return None
    separator = encoding.get("configuration", {}).get("separator", "/")
    return _Stored(kvstore, f"{prefix}c{separator}", separator, "zstd" in codecs)


class _Value(io.RawIOBase):
    """The value of a key as a file."""

    def __init__(self, kvstore: Any, key: str) -> None:
        self.key = key
        self._kvstore, self._place = kvstore, 0

    def exists(self) -> bool:
        return self._kvstore.read(self.key, byte_range=slice(0, 0)).result().state == "value"

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        assert size >= 0
        try:
            data = self._range(self._place + size)
        except ValueError:  # nearer than this to the end, which nothing tells before
            data = self._range(None)
        self._place += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(min(len(buffer), _BLOCK))
        buffer[: len(data)] = data
        return len(data)

    def _range(self, end: int | None) -> bytes:
        return self._kvstore.read(self.key, byte_range=slice(self._place, end)).result().value


class _Zeros(io.RawIOBase):
    """Zeros without an end."""

    def readinto(self, buffer: Any) -> int:
        memoryview(buffer)[:] = bytes(len(buffer))
        return len(buffer)


def _decoded(
    stored: _Stored,
    shape: tuple[int, ...],
    dtype: np.dtype,
    chunks: tuple[int, ...],
    rows: int,
    strict: bool,
) -> Iterator[np.ndarray]:
    """Pieces of an array, from the chunks of a row of chunks decompressed in step."""
    rows = min(rows, shape[0], chunks[0])
    counts = [math.ceil(size / chunk) for size, chunk in zip(shape, chunks, strict=True)]
    buffers = [np.empty((rows, *shape[1:]), dtype) for _ in range(2)]
    is_whole = chunks[1:] == shape[1:]
    one = None if is_whole else np.empty((rows, *chunks[1:]), dtype)
    turn = itertools.cycle(buffers)
    for number in range(counts[0]):
        columns = list(itertools.product(*map(range, counts[1:])))
        streams = [stored.open((number, *column), strict) for column in columns]
        end = min((number + 1) * chunks[0], shape[0])
        for start in range(number * chunks[0], end, rows):
            piece = next(turn)[: end - start]
            for column, stream in zip(columns, streams, strict=True):
                if one is None:
                    _fill(piece, stream)
                else:
                    _fill(one[: len(piece)], stream)
                    _place(one[: len(piece)], column, piece)
            yield piece


def _fill(array: np.ndarray, stream: Any) -> None:
    view, done = array.reshape(-1).view(np.uint8).data, 0
    try:
        while done < len(view):
            count = stream.readinto(view[done:])
            if not count:
                raise EOFError(f"a chunk cut off {len(view) - done} bytes before these rows' end")
            done += count
    except Exception as error:
        if type(error).__name__ == "ZstdError":
            raise EOFError(f"a chunk that is not zstd's: {error}") from error
        raise


def _place(chunk: np.ndarray, column: tuple[int, ...], piece: np.ndarray) -> None:
    """Puts rows of a chunk into rows of the array; the last chunks reach beyond it."""
    starts = [number * size for number, size in zip(column, chunk.shape[1:], strict=True)]
    where = tuple(
        slice(start, start + size) for start, size in zip(starts, chunk.shape[1:], strict=True)
    )
    target = piece[(slice(None), *where)]
    target[...] = chunk[tuple(slice(0, size) for size in target.shape)]
