"""Where converted tensors go: safetensors files or an Orbax checkpoint, written as they come."""

import concurrent.futures
import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorstore

from convert.blocks import blocks, is_finite
from convert.safetensors_file import SafetensorsFile, in_order, size_of

Tensors = Mapping[str, tuple[np.dtype, tuple[int, ...]]]
Progress = Callable[[int], None]  # takes the number of bytes that are done, as they are

_WORKERS = 2
# An Orbax array up to this many bytes is one chunk; of a larger one, a layer or as many rows are.
_ONE_CHUNK = 64 << 20


class Sink(Protocol):
    """Takes tensors in any order, whole or by rows, and finishes when all are there."""

    def write(self, name: str, start: int | None, array: np.ndarray) -> None:
        """Takes the rows of a tensor from `start` on; None for a whole tensor.

        Raises:
            ValueError: a number is not finite, or not in the dtype it is written in.
            OSError: it cannot be written.
        """
        ...

    def close(self) -> None:
        """Waits until everything is on disk."""
        ...

    def abandon(self) -> None:
        """Lets go of what is open."""
        ...


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
            self._files.popitem()[1].close(sync=True)
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
            self._files.popitem()[1].close(sync=False)


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
    if is_finite(np.ascontiguousarray(source)):
        largest = np.abs(source.astype(np.float64)).max()
        raise ValueError(f"{name}: expected numbers that {rows.dtype} can hold, got {largest:.4g}")
    if not allow:
        count = int((~np.isfinite(rows.astype(np.float32))).sum())
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
        self._context = tensorstore.Context()
        self._stores: dict[str, Any] = {}
        self._gathered: dict[str, tuple[np.ndarray, int]] = {}
        self._pending: list[Any] = []

    def write(self, name: str, start: int | None, array: np.ndarray) -> None:
        values = np.array(array, self._tensors[name][0], order="C")
        check_finite(name, values, array, self._allow_non_finite)
        if start is None:
            self._write(self._store(name), values)
        else:
            self._gather(name, start, values)
        self._progress(values.nbytes)

    def close(self) -> None:
        while self._pending:
            self._pending[0].result()
            del self._pending[0]
        assert not self._gathered
        assert self._stores.keys() == self._tensors.keys()
        metadata = self._folder / "_METADATA"
        metadata.write_text(json.dumps(tree_metadata(self._tensors)))
        for path in (path for path in self._folder.rglob("*") if path.is_file()):
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def abandon(self) -> None:
        # What is under way cannot be called back: it would appear in a folder that was removed.
        for pending in self._pending:
            with contextlib.suppress(Exception):
                pending.result()

    def _gather(self, name: str, start: int, values: np.ndarray) -> None:
        """Writes chunks that are whole, and keeps the rows of one that is not."""
        dtype, shape = self._tensors[name]
        rows = chunk_shape(dtype, shape)[0]
        while len(values):
            first = start // rows * rows
            length = min(rows, shape[0] - first)
            chunk, count = self._gathered.pop(name, (None, 0))
            chunk = np.empty((length, *shape[1:]), dtype) if chunk is None else chunk
            part = values[: first + length - start]
            chunk[start - first : start - first + len(part)] = part
            if count + len(part) == length:
                self._write(self._store(name)[first : first + length], chunk)
            else:
                self._gathered[name] = (chunk, count + len(part))
            start, values = start + len(part), values[len(part) :]

    def _store(self, name: str) -> Any:
        if name not in self._stores:
            dtype, shape = self._tensors[name]
            spec = array_spec(self._folder, name, dtype, shape, chunk_shape(dtype, shape))
            opening = tensorstore.open(spec, context=self._context, create=True)
            self._stores[name] = opening.result()
        return self._stores[name]

    def _write(self, place: Any, values: np.ndarray) -> None:
        """One array is compressed while the next one is read."""
        while len(self._pending) >= _WORKERS:
            self._pending[0].result()
            del self._pending[0]
        self._pending.append(place.write(values))


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
    """The chunks of a stored array: one, or as many rows as 64 MiB hold, and at least one."""
    size = size_of(dtype, shape)
    if size <= _ONE_CHUNK:
        return list(shape)
    return [max(1, _ONE_CHUNK * shape[0] // size), *shape[1:]]


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
