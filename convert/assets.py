"""Normalisation statistics, which belong to a checkpoint and are found beside or above it."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

FOLDER, FILE = "assets", "norm_stats.json"

_DEEPEST = 2  # an asset's id may be that of a data set on the hub, with its owner's name


def find(weights: epath.Path) -> dict[str, bytes]:
    """Every norm_stats.json of a checkpoint, by its path below `assets`.

    openpi keeps them in `<checkpoint>/assets/<asset_id>`, beside `params` or model.safetensors;
    older converters in the folder above. Where two have the same path, the nearer one counts.

    Args:
        weights: the Orbax folder or the safetensors file.

    Raises:
        ValueError: one of the files is no JSON with "norm_stats".
    """
    found: dict[str, bytes] = {}
    folder = weights if weights.is_dir() else weights.parent
    for place in (folder, folder.parent, folder.parent.parent):
        assets = place / FOLDER
        files = {str(path.relative_to(assets)): path for path in _below(assets, _DEEPEST)}
        if (place / FILE).exists():
            files.setdefault(FILE, place / FILE)
        for name, path in sorted(files.items()):
            if name not in found:
                found[name] = path.read_bytes()
                statistics(str(path), found[name])
    return found


def _below(folder: epath.Path, deepest: int) -> Iterator[epath.Path]:
    if not folder.is_dir():
        return
    if (folder / FILE).exists():
        yield folder / FILE
    if deepest:
        for each in folder.iterdir():
            yield from _below(each, deepest - 1)


def statistics(name: str, data: bytes) -> Mapping[str, Any]:
    """What a norm_stats.json holds: {"state": {"mean", "std", "q01", "q99"}, "actions": {...}}.

    Raises:
        ValueError: it is another kind of file.
    """
    try:
        found = json.loads(data)["norm_stats"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name}: expected JSON with 'norm_stats', got {error!r}") from error
    if not isinstance(found, dict) or not all(isinstance(each, dict) for each in found.values()):
        raise ValueError(f"{name}: expected statistics by name, got {found!r}")
    return found


def to_file(stats: Mapping[str, Any]) -> bytes:
    """The contents of a norm_stats.json."""
    plain = {
        key: {
            name: None if value is None else np.asarray(value).tolist()
            for name, value in each.items()
        }
        for key, each in stats.items()
    }
    return (json.dumps({"norm_stats": plain}, indent=2) + "\n").encode()
