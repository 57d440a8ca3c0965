"""Checkpoints as mappings from names to arrays that are read when they are used.

Neither JAX nor PyTorch is needed. Opening reads names, shapes and dtypes alone.
"""

import json
import os
from collections.abc import Callable, Mapping

from etils import epath

from convert.lazy_array import LazyArray
from convert.orbax_reading import is_orbax, open_orbax
from convert.safetensors_file import open_safetensors

SAFETENSORS_FILE = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
ADAPTER_FOLDER = "adapter"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_PREFIX = "base_model.model."

Opener = Callable[[epath.Path], dict[str, LazyArray]]


def open_checkpoint(path: str | os.PathLike[str]) -> Mapping[str, LazyArray]:
    """The arrays of a checkpoint, by name.

    Args:
        path: an Orbax checkpoint (its folder, or the folder above its `params`), a `.safetensors`
            file, or a folder with `model.safetensors` or `model.safetensors.index.json`. An
            adapter in PEFT's format in the folder's `adapter` belongs to it. Anything that epath
            opens, such as gs://.

    Returns:
        Names as stored: joined by "/" in an Orbax checkpoint, by "." in a safetensors file;
        adapters' without PEFT's prefix. An array stays readable as long as its files stay in place.

    Raises:
        FileNotFoundError: there is nothing at the path, or a file of the checkpoint is missing.
        ValueError: it is no checkpoint, more than one, or a broken one.
    """
    place, open_place = locate(path)
    arrays = open_place(place)
    if open_place is open_orbax:
        return arrays
    factors = _open_adapter(place)
    if both := sorted(arrays.keys() & factors.keys()):
        raise ValueError(f"{place}: expected arrays that its adapter has not, got both for {both}")
    return arrays | factors


def _open_adapter(place: epath.Path) -> dict[str, LazyArray]:
    """The adapter that belongs to a safetensors file; nothing where there is none."""
    folder, stray = place.parent / ADAPTER_FOLDER, place.parent / ADAPTER_FILE
    if stray.exists() and stray != place:
        raise ValueError(f"{stray}: expected adapters in {folder}, got them beside the weights")
    if not folder.exists():
        return {}
    if not (folder / ADAPTER_FILE).exists():
        raise FileNotFoundError(f"{folder}: expected {ADAPTER_FILE} in it, got none")
    factors = open_safetensors(folder / ADAPTER_FILE)
    return {name.removeprefix(ADAPTER_PREFIX): factor for name, factor in factors.items()}


def locate(path: str | os.PathLike[str]) -> tuple[epath.Path, Opener]:
    """The checkpoint at a path: its folder (Orbax) or file (safetensors), and what opens it.

    Raises:
        FileNotFoundError, ValueError: as `open_checkpoint`.
    """
    place = epath.Path(path)
    if "://" not in str(place):
        place = epath.Path(os.path.abspath(place))
    if not place.exists():
        raise FileNotFoundError(f"expected a checkpoint, got a path that does not exist: {place}")
    if not place.is_dir():
        return place, open_safetensors
    found = _checkpoints_in(place)
    if len(found) != 1:
        raise ValueError(
            f"{place}: expected one checkpoint: {SAFETENSORS_FILE}, {SAFETENSORS_INDEX}, or an "
            f"Orbax checkpoint here or in 'params'; got {[str(place) for place in found]}"
        )
    [(place, open_place)] = found.items()
    return place, open_place


def _checkpoints_in(folder: epath.Path) -> dict[epath.Path, Opener]:
    files = {SAFETENSORS_INDEX: _open_sharded_safetensors, SAFETENSORS_FILE: open_safetensors}
    found: dict[epath.Path, Opener] = {
        folder / name: opener for name, opener in files.items() if (folder / name).exists()
    }
    orbax = [place for place in (folder / "params", folder) if is_orbax(place)]
    return found | dict.fromkeys(orbax, open_orbax)


def _open_sharded_safetensors(index: epath.Path) -> dict[str, LazyArray]:
    files = _weight_map(index)
    missing = sorted({file for file in files.values() if not (index.parent / file).exists()})
    if missing:
        raise FileNotFoundError(f"{index}: expected the files it names, got none for {missing}")
    shards = {file: open_safetensors(index.parent / file) for file in set(files.values())}
    absent = sorted(name for name, file in files.items() if name not in shards[file])
    if absent:
        raise ValueError(f"{index}: expected arrays in the files it names, got none for {absent}")
    extra = sorted(
        name for file, shard in shards.items() for name in shard if files.get(name) != file
    )
    if extra:
        raise ValueError(f"{index}: expected every array of its files in it, not got {extra}")
    return {name: shards[file][name] for name, file in files.items()}


def _weight_map(index: epath.Path) -> dict[str, str]:
    try:
        files = json.loads(index.read_text())["weight_map"]
        if not all(isinstance(file, str) for file in files.values()):
            raise ValueError("a name of a file that is no text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: expected JSON with a 'weight_map', got {error!r}") from error
    return files
