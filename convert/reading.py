"""Checkpoints as mappings from names to arrays that are read when they are used.

Orbax checkpoints are read through TensorStore and safetensors through their NumPy interface, so
that neither JAX nor PyTorch is needed. Opening reads names, shapes and dtypes alone.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore
from safetensors import SafetensorError, safe_open

SAFETENSORS_FILE = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"

_SAFETENSORS_DTYPES: dict[str, Any] = {
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
}

Opener = Callable[[pathlib.Path], dict[str, "LazyArray"]]

# The file that describes an array beside its chunks, and TensorStore's driver for that format.
_ZARR_DRIVERS = {".zarray": "zarr", "zarr.json": "zarr3"}


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array on disk; `np.asarray` reads all of it, and an index a part.

    Attributes:
        shape: of the whole array.
        dtype: as stored; bfloat16 is ml_dtypes'.
        read: reads what an index selects.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Any], np.ndarray]

    def __getitem__(self, index: int | slice) -> np.ndarray:
        return self.read(index)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy  # every read is a copy
        return self.read(...).astype(dtype or self.dtype, copy=False)


def open_checkpoint(path: str | os.PathLike[str]) -> Mapping[str, LazyArray]:
    """The arrays of a checkpoint, by name.

    Args:
        path: an Orbax checkpoint (its folder, or the folder above its `params`), a `.safetensors`
            file, or a folder with `model.safetensors` or `model.safetensors.index.json`.

    Returns:
        Names as stored: joined by "/" in an Orbax checkpoint, by "." in a safetensors file. An
        array stays readable as long as its files stay in place.

    Raises:
        FileNotFoundError: there is nothing at the path, or a file of the checkpoint is missing.
        ValueError: it is no checkpoint, more than one, or a broken one.
    """
    path = pathlib.Path(path).absolute()
    if not path.exists():
        raise FileNotFoundError(f"expected a checkpoint, got a path that does not exist: {path}")
    if path.is_file():
        return _open_safetensors(path)
    found = _checkpoints_in(path)
    if len(found) != 1:
        raise ValueError(
            f"{path}: expected one checkpoint: {SAFETENSORS_FILE}, {SAFETENSORS_INDEX}, or an "
            f"Orbax checkpoint here or in 'params'; got {[str(place) for place in found]}"
        )
    [(place, open_place)] = found.items()
    return open_place(place)


def _checkpoints_in(folder: pathlib.Path) -> dict[pathlib.Path, Opener]:
    files = {SAFETENSORS_INDEX: _open_sharded_safetensors, SAFETENSORS_FILE: _open_safetensors}
    found = {folder / name: opener for name, opener in files.items() if (folder / name).is_file()}
    orbax = [place for place in (folder / "params", folder) if _is_orbax(place)]
    return found | dict.fromkeys(orbax, _open_orbax)


def _open_safetensors(path: pathlib.Path) -> dict[str, LazyArray]:
    try:
        with safe_open(path, framework="numpy") as file:
            names = file.keys()
            return {name: _safetensors_array(path, name, file.get_slice(name)) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, got {error}") from error


def _safetensors_array(path: pathlib.Path, name: str, view: Any) -> LazyArray:
    stored = view.get_dtype()
    if stored not in _SAFETENSORS_DTYPES:
        known = sorted(_SAFETENSORS_DTYPES)
        raise ValueError(f"{path}: {name}: expected a dtype of {known}, got {stored}")

    def read(index: Any) -> np.ndarray:
        # Opened anew: pages that were read count as this process's memory until the file is closed.
        with safe_open(path, framework="numpy") as file:
            return file.get_tensor(name) if index is ... else file.get_slice(name)[index]

    dtype = np.dtype(_SAFETENSORS_DTYPES[stored])
    return LazyArray(shape=tuple(view.get_shape()), dtype=dtype, read=read)


def _open_sharded_safetensors(index: pathlib.Path) -> dict[str, LazyArray]:
    try:
        files = json.loads(index.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{index}: expected JSON with a 'weight_map', got {error!r}") from error
    missing = sorted({file for file in files.values() if not (index.parent / file).is_file()})
    if missing:
        raise FileNotFoundError(f"{index}: expected the files it names, got none for {missing}")
    shards = {file: _open_safetensors(index.parent / file) for file in set(files.values())}
    absent = sorted(name for name, file in files.items() if name not in shards[file])
    if absent:
        raise ValueError(f"{index}: expected arrays in the files it names, got none for {absent}")
    return {name: shards[file][name] for name, file in files.items()}


def _is_orbax(folder: pathlib.Path) -> bool:
    marks = ("_METADATA", "manifest.ocdbt", "*/.zarray", "*/zarr.json")
    return any(next(folder.glob(mark), None) for mark in marks)


def _open_orbax(folder: pathlib.Path) -> dict[str, LazyArray]:
    kvstore: dict[str, Any] = {"driver": "file", "path": f"{folder}/"}
    if (folder / "manifest.ocdbt").exists():
        kvstore = {"driver": "ocdbt", "base": kvstore, "path": ""}
    try:
        keys = tensorstore.KvStore.open(kvstore).result().list().result()
        specs = _zarr_specs((key.decode() for key in keys), kvstore)
        strict = {"fill_missing_data_reads": not _stores_every_chunk(folder)}
        opening = {name: tensorstore.open(spec | strict, read=True) for name, spec in specs}
        stores = {name: future.result() for name, future in opening.items()}
    except ValueError as error:
        raise ValueError(f"{folder}: expected an Orbax checkpoint, got {error}") from error
    if not stores:
        raise ValueError(f"{folder}: expected an Orbax checkpoint, got one without arrays")
    return {name: _orbax_array(folder, name, store) for name, store in stores.items()}


def _zarr_specs(
    keys: Iterable[str], kvstore: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and TensorStore spec of every array; Orbax joins the parts of a name by "."."""
    for key in sorted(keys):
        array, _, file = key.rpartition("/")
        if file in _ZARR_DRIVERS:
            within = kvstore | {"path": f"{kvstore['path']}{array}/"}
            yield array.replace(".", "/"), {"driver": _ZARR_DRIVERS[file], "kvstore": within}


def _stores_every_chunk(folder: pathlib.Path) -> bool:
    """Whether a missing chunk is damage; older Orbax left out those with nothing but zeros."""
    metadata = folder / "_METADATA"
    if not metadata.exists():
        return False
    return json.loads(metadata.read_text()).get("store_array_data_equal_to_fill_value", False)


def _orbax_array(folder: pathlib.Path, name: str, store: Any) -> LazyArray:
    def read(index: Any) -> np.ndarray:
        try:
            return store[index].read().result()
        except ValueError as error:
            raise ValueError(f"{folder}: {name}: expected a whole array, got {error}") from error

    return LazyArray(shape=tuple(store.shape), dtype=store.dtype.numpy_dtype, read=read)
