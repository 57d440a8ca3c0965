"""A JSON file that holds one object."""

import json
import os
from typing import Any

from etils import epath


def read(path: epath.Path | os.PathLike[str]) -> dict[str, Any]:
    """The object in a file.

    Raises:
        ValueError: there is something else in it.
    """
    try:
        found = json.loads(epath.Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON object, got {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(found).__name__}")
    return found
