"""What a policy refuses of an observation, since its transforms would take it in silence.

Clients are believed in nothing: the errors name the key, and how large they are does not depend on
what was sent.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pruner_run.data.robots import Robot
from pruner_run.data.transforms import Sample

MOST_CHARACTERS = 10_000  # of a prompt; models read some hundred tokens
MOST_PIXELS = 8192  # of an image's side
_SLACK = 0.1  # of a float image beyond [0, 1], from resizing


def check(sample: Sample, robot: Robot, state_dims: Sequence[int | None]) -> None:
    """Checks states, prompt, images and masks that are there; the transforms say what is missing.

    Args:
        sample: with paths as keys.
        robot: whose it is.
        state_dims: how many numbers each part of the state has; None for any.

    Raises:
        ValueError: something does not fit.
    """
    for key, length in zip(robot.state, state_dims, strict=True):
        if key in sample:
            _check_state(key, _array(sample, key), length)
    _check_prompt(sample.get("prompt", ""))
    for key in robot.cameras.values():
        if key in sample:
            _check_image(key, _array(sample, key))
    for camera in robot.cameras:
        if (key := f"image_mask/{camera}") in sample:
            _check_mask(key, _array(sample, key))


def _array(sample: Sample, key: str) -> np.ndarray:
    try:
        return np.asarray(sample[key])
    except ValueError as error:
        raise ValueError(f"{key}: expected an array, got rows of different lengths") from error


def _check_state(key: str, values: np.ndarray, length: int | None) -> None:
    values = np.atleast_1d(values)
    if values.dtype.kind not in "iuf" or values.ndim != 1:
        raise ValueError(
            f"{key}: expected a vector of numbers, got {list(values.shape)} of {values.dtype}"
        )
    if length is not None and len(values) != length:
        raise ValueError(f"{key}: expected {length} numbers, got {len(values)}")
    wrong = values[~np.isfinite(values)]
    if wrong.size:
        raise ValueError(f"{key}: expected finite numbers, got {wrong.size} others: {wrong[0]} ...")


def _check_prompt(prompt: Any) -> None:
    if isinstance(prompt, list | tuple):
        raise ValueError(f"prompt: expected one text, got {len(prompt)}")
    text = np.asarray(prompt)
    if text.dtype.kind != "U" or text.size != 1:
        raise ValueError(f"prompt: expected a text, got {list(text.shape)} of {text.dtype}")
    if (length := len(text.item())) > MOST_CHARACTERS:
        raise ValueError(f"prompt: expected at most {MOST_CHARACTERS} characters, got {length}")


def _check_image(key: str, image: np.ndarray) -> None:
    """Floats of 0 to 255, or -1 to 1, would be cut to a white image or half of one; a side of
    millions of pixels takes long to resize."""
    if max(image.shape, default=0) > MOST_PIXELS:
        found = list(image.shape)
        raise ValueError(f"{key}: expected at most {MOST_PIXELS} pixels a side, got {found}")
    if image.dtype.kind != "f" or not image.size:
        return
    low, high = float(image.min()), float(image.max())
    if not (low >= -_SLACK and high <= 1 + _SLACK):
        raise ValueError(f"{key}: expected floats in [0, 1], got {low:.3g} to {high:.3g}")


def _check_mask(key: str, mask: np.ndarray) -> None:
    if mask.size != 1 or mask.dtype.kind not in "bi":
        raise ValueError(f"{key}: expected True or False, got {list(mask.shape)} of {mask.dtype}")
