"""Where converted tensors go: safetensors files or an Orbax checkpoint, written as they come."""

import concurrent.futures
import contextlib
import errno
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorstore

from convert.blocks import blocks, copy, is_finite
from convert.orbax_reading import without_spec
from convert.safetensors_file import SafetensorsFile, in_order, size_of

Tensors = Mapping[str, tuple[np.dtype, tuple[int, ...]]]
# Takes the number of bytes that are done, as they are; threads call it side by side.
Progress = Callable[[int], None]

_WORKERS = 2
# Bytes of an Orbax array that are stored in one piece, at the most. Memory for as many stays in the
# process and is used again; for more than 32 MiB the C library asks the system, which is slow.
_CHUNK = 16 << 20
_GATHERED = 64 << 20  # bytes of whole rows that are written at once, so that chunks go side by side


class Sink(Protocol):
    """Takes tensors in any order, whole or by rows from the first on, until all are there."""

    def write(self, name: str, start: int | None, array: np.ndarray) -> None:
        """Takes the rows of a tensor from `start` on; None for a whole tensor.

        Raises:
            ValueError: a number is not finite, or not in the dtype it is written in.
            OSError: it cannot be written.
        """
        ...

    def close(self) -> None:
        """Finishes; `convert.output.folder_in_full` waits until everything is on disk."""
        ...

    def abandon(self) -> None:
        """Lets go of what is open."""
        ...


@contextlib.contextmanager
def closing(sink: Sink) -> Iterator[Sink]:
    """Closes a sink when all is written, and abandons it when that failed."""
    try:
        yield sink
        sink.close()
    except BaseException:
        sink.abandon()
        raise


class SafetensorsSink:
    """`<stem>.safetensors`, or shards with an index where that would be too large.

    Args:
        folder: where to.
        stem: of the file's name.
        tensors: dtype and shape by name; those never written are zeros.
        metadata: free text entries of every header.
        max_shard_size: bytes of a file, at the most; None for any number. A tensor is not split.
        allow_non_finite: takes infinities and NaN.
        progress: is told of the bytes written.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        tensors: Tensors,
        metadata: Mapping[str, str],
        *,
        max_shard_size: int | None = None,
        allow_non_finite: bool = False,
        progress: Progress = lambda count: None,
    ) -> None:
        self._folder, self._stem, self._tensors = folder, stem, tensors
        self._allow_non_finite, self._progress = allow_non_finite, progress
        self._pool = concurrent.futures.ThreadPoolExecutor(_WORKERS)
        shards = list(_shards(tensors, max_shard_size))
        names = [f"{stem}.safetensors"]
        if len(shards) > 1:
            numbers = range(1, len(shards) + 1)
            names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in numbers]
        self._shard_of = {
            name: file for file, shard in zip(names, shards, strict=True) for name in shard
        }
        self._files = {
            file: SafetensorsFile(folder / file, shard, metadata)
            for file, shard in zip(names, shards, strict=True)
        }

    def write(self, name: str, start: int | None, array: np.ndarray) -> None:
        dtype, shape = self._tensors[name]
        file = self._files[self._shard_of[name]]
        row = size_of(dtype, shape[1:])

        def write_part(first: int, part: np.ndarray) -> None:
            def write_rows(begin: int, rows: np.ndarray) -> None:
                check_finite(name, rows, part[begin : begin + len(rows)], self._allow_non_finite)
                file.write(name, (first + begin) * row, rows)

            blocks(part, dtype, write_rows)

        start = 0 if start is None else start
        share = max(1, math.ceil(len(array) / _WORKERS))
        parts = range(0, len(array), share)
        tasks = [
            self._pool.submit(write_part, start + first, array[first : first + share])
            for first in parts
        ]
        for task in tasks:
            task.result()
        self._progress(size_of(dtype, array.shape))

    def close(self) -> None:
        self._pool.shutdown()
        while self._files:
            self._files.popitem()[1].close()
        if len(set(self._shard_of.values())) > 1:
            index = {
                "metadata": {"total_size": sum(size_of(*each) for each in self._tensors.values())},
                "weight_map": dict(sorted(self._shard_of.items())),
            }
            path = self._folder / f"{self._stem}.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2) + "\n")

    def abandon(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        while self._files:
            self._files.popitem()[1].close()


def _shards(tensors: Tensors, max_size: int | None) -> Iterator[Tensors]:
    """The tensors in order, cut where a file would become too large."""
    shard: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    size = 0
    for name in in_order(tensors):
        more = size_of(*tensors[name])
        if shard and max_size is not None and size + more > max_size:
            yield shard
            shard, size = {}, 0
        shard[name] = tensors[name]
        size += more
    yield shard


def check_finite(name: str, rows: np.ndarray, source: np.ndarray, allow: bool) -> None:
    """Raises a ValueError where numbers are not finite, or no longer are after a cast."""
    if is_finite(rows):
        return
    lost = np.isfinite(source) & ~np.isfinite(rows)
    if lost.any():
        largest = np.abs(source[lost].astype(np.float64)).max()
        raise ValueError(f"{name}: expected numbers that {rows.dtype} can hold, got {largest:.4g}")
    if not allow:
        count = int((~np.isfinite(rows)).sum())
        raise ValueError(
            f"{name}: expected finite weights, got {count} that are infinite or NaN in "
            f"{rows.size} looked at (--allow_non_finite takes them)"
        )


class OrbaxSink:
    """An Orbax checkpoint as openpi's trainer saves it: OCDBT, zarr 2, zstd.

    Args:
        folder: of the checkpoint, such as `params`.
        tensors: dtype and shape by name, the parts of a name joined by "/".
        allow_non_finite: takes infinities and NaN.
        progress: is told of the bytes written, counted before compression.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Tensors,
        *,
        allow_non_finite: bool = False,
        progress: Progress = lambda count: None,
    ) -> None:
        folder.mkdir()
        self._folder, self._tensors = folder, tensors
        self._allow_non_finite, self._progress = allow_non_finite, progress
        self._context = tensorstore.Context({"file_io_sync": False})  # nor does `close`
        self._stores: dict[str, Any] = {}
        self._gathered: dict[str, _Rows] = {}
        self._under_way: dict[str, Any] = {}

    def write(self, name: str, start: int | None, array: np.ndarray) -> None:
        start = start or 0
        while len(array):
            rows = self._gathered.get(name) or self._first_rows(name)
            part = array[: rows.end - start]
            place = rows.values[start - rows.first :][: len(part)]
            copy(place, part)
            check_finite(name, place, part, self._allow_non_finite)
            start, array = start + len(part), array[len(part) :]
            if start == rows.end:
                self._write(name, rows)
            self._progress(place.nbytes)

    def close(self) -> None:
        assert not self._gathered
        assert self._stores.keys() == self._tensors.keys()
        metadata = self._folder / "_METADATA"
        metadata.write_text(json.dumps(tree_metadata(self._tensors)))

    def abandon(self) -> None:
        # What is under way cannot be called back: it would appear in a folder that was removed.
        for writing in self._under_way.values():
            with contextlib.suppress(Exception):
                writing.result()

    def _first_rows(self, name: str) -> "_Rows":
        dtype, shape = self._tensors[name]
        chunk = chunk_shape(dtype, shape)[0]
        length = min(shape[0], chunk * max(1, _GATHERED // size_of(dtype, (chunk, *shape[1:]))))
        self._gathered[name] = _Rows(0, np.empty((length, *shape[1:]), dtype))
        return self._gathered[name]

    def _write(self, name: str, rows: "_Rows") -> None:
        """Writes what was gathered, and goes on to the rows behind it, in the same memory."""
        place = self._store(name)[rows.first : rows.end]
        self._under_way[name] = place.write(rows.values)
        _result(self._under_way[name])
        left = self._tensors[name][1][0] - rows.end
        if left:
            self._gathered[name] = _Rows(rows.end, rows.values[:left])
        else:
            del self._gathered[name]

    def _store(self, name: str) -> Any:
        if name not in self._stores:
            dtype, shape = self._tensors[name]
            spec = array_spec(self._folder, name, dtype, shape, chunk_shape(dtype, shape))
            self._under_way[name] = tensorstore.open(spec, context=self._context, create=True)
            self._stores[name] = _result(self._under_way[name])
        return self._stores[name]


class _Rows(NamedTuple):
    """Rows of a tensor that are written together, and the first of them."""

    first: int
    values: np.ndarray

    @property
    def end(self) -> int:
        return self.first + len(self.values)


def _result(future: Any) -> Any:
    """TensorStore's, whose errors are all of one kind: here is none that is not the disk's."""
    try:
        return future.result()
    except ValueError as error:
        number = re.search(r"os_error_code='(\d+)'", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, without_spec(error)) from error


def array_spec(
    folder: Path, name: str, dtype: np.dtype, shape: Sequence[int], chunks: Sequence[int]
) -> dict[str, Any]:
    """TensorStore's spec of an array as Orbax stores it."""
    kvstore = {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{folder}/"},
        "path": f"{name.replace('/', '.')}/",
        "config": {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 100_000_000},
    }
    metadata = {
        "shape": list(shape),
        "chunks": list(chunks),
        "dtype": "bfloat16" if dtype.name == "bfloat16" else dtype.newbyteorder("<").str,
        "compressor": {"id": "zstd", "level": 1},
        "fill_value": None,
        "filters": None,
        "order": "C",
        "dimension_separator": ".",
        "zarr_format": 2,
    }
    return {
        "driver": "zarr",
        "kvstore": kvstore,
        "metadata": metadata,
        "store_data_equal_to_fill_value": True,
    }


def chunk_shape(dtype: np.dtype, shape: tuple[int, ...]) -> list[int]:
    """The chunks of a stored array: one, or a part of the first axis, then of the next ones."""
    chunks = list(shape)
    for axis, length in enumerate(shape):
        chunks[axis] = min(length, max(1, _CHUNK * length // size_of(dtype, chunks)))
    return chunks


def tree_metadata(names: Iterable[str]) -> dict[str, Any]:
    """What Orbax's `_METADATA` says of a tree of NumPy arrays."""
    tree = {}
    for name in names:
        keys = tuple(name.split("/"))
        tree[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    return {
        "tree_metadata": tree,
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
