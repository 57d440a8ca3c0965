"""The tables of LeRobot datasets: NumPy to Arrow and back, images among the numbers.

In a parquet file an image is an encoded file in a struct, a vector is a list of fixed length, and
the schema's metadata says so once more in the words of Hugging Face's `datasets`.
"""

import bisect
import io
import itertools
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import UInt8
from PIL import Image

from pruner_run.data.lerobot_features import Feature

ROW_GROUP_BYTES = 1 << 30  # of images, still encoded, that are kept for the next reads

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def read_parquet(
    path: Path, columns: Sequence[str] | None = None, *, require: Collection[str] = ()
) -> pa.Table:
    """A parquet file's columns, all unless given, with errors that name the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no parquet file, is damaged or lacks one of the required columns.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a parquet file, found none")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            if missing := sorted(set(require) - set(names)):
                raise ValueError(f"{path}: expected the columns {missing}, got {names}")
            table = file.read(columns)
            _check_extremes(table, file.metadata, path)
            return table
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: expected a parquet file, got a damaged one") from error


def _check_extremes(table: pa.Table, metadata: pq.FileMetaData, path: Path) -> None:
    """Against the file's own statistics: few files have checksums, nearly all have these.

    Bytes that were written over may well be read as other numbers.
    """
    expected = _extremes(metadata)
    for name in table.column_names:
        values = _innermost(table[name].combine_chunks())
        of_column = [span for leaf, span in expected.items() if f"{leaf}.".startswith(f"{name}.")]
        if not _is_number(values.type) or len(of_column) != 1:
            continue
        extremes = pc.min_max(values)  # pyright: ignore[reportAttributeAccessIssue]
        found = tuple(extremes.as_py().values())
        if found != of_column[0]:
            numbers = "from {} to {}".format(*of_column[0])
            raise ValueError(
                f"{path}: expected {name} {numbers}, got from {found[0]} to {found[1]}"
            )


def _extremes(metadata: pq.FileMetaData) -> dict[str, tuple[Any, Any]]:
    """The least and the largest number of each leaf that has them in every row group."""
    spans: dict[str, list[tuple[Any, Any]]] = {}
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for place in range(group.num_columns):
            leaf = group.column(place)
            found = leaf.statistics
            if found is not None and found.has_min_max:
                spans.setdefault(leaf.path_in_schema, []).append((found.min, found.max))
    return {
        leaf: (min(low for low, _ in each), max(high for _, high in each))
        for leaf, each in spans.items()
        if len(each) == metadata.num_row_groups
    }


def _is_number(kind: pa.DataType) -> bool:
    return kind in (pa.float32(), pa.float64(), pa.int32(), pa.int64())


def to_numpy(column: pa.ChunkedArray, feature: Feature, where: str) -> np.ndarray:
    """A column of numbers, or of lists of them, as [rows, *shape], or [rows] for scalars."""
    shape = (len(column),) if feature.shape == (1,) else (len(column), *feature.shape)
    values = _innermost(column.combine_chunks())
    if values.null_count or len(values) != math.prod(shape):
        found = f"{len(values) - values.null_count} numbers"
        raise ValueError(f"{where}: expected {list(shape)} without nulls, got {found}")
    if feature.dtype == "string":
        return np.array(values.to_pylist(), dtype=object).reshape(shape)
    try:
        numbers = values.to_numpy(zero_copy_only=False)
        return numbers.astype(feature.dtype, casting="same_kind").reshape(shape)
    except TypeError:
        raise ValueError(f"{where}: expected {feature.dtype}, got {column.type}") from None


def _innermost(values: pa.Array) -> pa.Array:
    """The numbers in lists of lists of ... them."""
    if isinstance(values, pa.ExtensionArray):  # `datasets` makes one for matrices
        return _innermost(values.storage)
    if isinstance(values, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        return _innermost(values.flatten())
    return values


def read_image(path: Path, column: str, row: int) -> UInt8[np.ndarray, "H W 3"]:
    """One image out of a parquet file, which holds them as encoded files."""
    modified = path.stat().st_mtime_ns
    metadata, starts = _row_groups(path, modified)
    group = bisect.bisect_right(starts, row) - 1
    try:
        images = recent.get(
            (path, modified, column, group), lambda: _read_row_group(path, metadata, column, group)
        )
        image = images[row - starts[group]].as_py()
        return np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB"))
    except (TypeError, KeyError, OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: expected an image in row {row} of {column}") from error


@lru_cache(maxsize=4096)
def _row_groups(path: Path, modified: int) -> tuple[pq.FileMetaData, list[int]]:
    """A file's metadata and the first row of each row group.

    `modified` is the file's time, so that a new file is read.
    """
    metadata = pq.read_metadata(path)
    lengths = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return metadata, [0, *itertools.accumulate(lengths)][:-1]


def _read_row_group(
    path: Path, metadata: pq.FileMetaData, column: str, group: int
) -> pa.ChunkedArray:
    """The images of a row group, the smallest part of a parquet file that can be read.

    In this thread alone: whoever loads data has threads of its own, and Arrow's take longer.
    """
    with pq.ParquetFile(
        path, metadata=metadata, pre_buffer=False, page_checksum_verification=True
    ) as file:
        return file.read_row_group(group, [f"{column}.bytes"], use_threads=False)[column]


class Recent:
    """What was read last, up to a number of bytes; safe to use from threads.

    Attributes:
        limit: the number of bytes; the last column is kept however large it is.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._kept: OrderedDict[Hashable, pa.ChunkedArray] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable, read: Callable[[], pa.ChunkedArray]) -> pa.ChunkedArray:
        """The column of a key, read if it is not here."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        column = read()
        with self._lock:
            if key not in self._kept:
                self._kept[key] = column
                self._bytes += column.nbytes
            while self._bytes > self.limit and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return column


recent = Recent(ROW_GROUP_BYTES)


def make_schema(features: dict[str, Feature]) -> pa.Schema:
    """Arrow's types, and in the metadata those of Hugging Face's `datasets`.

    Without the latter an image is just a struct to lerobot. Its older versions know no "List".
    """
    fields, described = [], {}
    for key, feature in features.items():
        if feature.dtype == "video":
            continue
        if feature.dtype == "image":
            fields.append(pa.field(key, IMAGE_TYPE))
            described[key] = {"_type": "Image"}
            continue
        kind = pa.from_numpy_dtype(feature.dtype) if feature.dtype != "string" else pa.string()
        what = {"dtype": feature.dtype, "_type": "Value"}
        if feature.shape != (1,):
            if len(feature.shape) != 1:
                raise ValueError(f"features: expected vectors, got {key} of {feature.shape}")
            kind = pa.list_(kind, feature.shape[0])
            what = {"feature": what, "length": feature.shape[0], "_type": "Sequence"}
        fields.append(pa.field(key, kind))
        described[key] = what
    return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": described}})})


def to_arrow(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    if kind == IMAGE_TYPE:
        rows = [{"bytes": _to_png(image), "path": None} for image in values]
        return pa.array(rows, IMAGE_TYPE)
    if pa.types.is_fixed_size_list(kind):
        flat = pa.array(values.ravel(), kind.value_type)
        return pa.FixedSizeListArray.from_arrays(flat, kind.list_size)
    return pa.array(values, kind)


def _to_png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()
