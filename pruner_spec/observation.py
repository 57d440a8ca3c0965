"""The model's input, checked once, where it enters.

`Observation` holds NumPy, JAX or PyTorch arrays alike: only shapes and dtypes are looked at, so
that checking costs no transfer and works on abstract values under `jax.jit`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np
from jaxtyping import Bool

from pruner_spec.buckets import PROMPT_BUCKETS, bucket
from pruner_spec.config import CAMERAS, IMAGE_SIZE, Pi0Config
from pruner_spec.images import resize_with_pad

Array = Any  # of NumPy, JAX or PyTorch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observation:
    """What a robot sees and is told.

    Attributes:
        images: a camera each, in the order of `CAMERAS`; [B, 224, 224, 3], float in [-1, 1], or all
            uint8 as cameras give them, which the model scales on its device.
        image_masks: bool [B] a camera; False where the camera is missing (its image is black).
        state: float [B, A], zero-padded.
        tokenized_prompt: integer [B, L], padded with 0.
        tokenized_prompt_mask: bool [B, L], True for the prompt's own tokens.

    Raises:
        ValueError: an array is missing, or its shape or dtype is not the expected one.
    """

    images: Mapping[str, Array]
    image_masks: Mapping[str, Array]
    state: Array
    tokenized_prompt: Array
    tokenized_prompt_mask: Array

    def __post_init__(self) -> None:
        for name in ("images", "image_masks"):
            given = getattr(self, name)
            if set(given) != set(CAMERAS):
                raise ValueError(f"{name}: expected the cameras {list(CAMERAS)}, got {list(given)}")
            object.__setattr__(self, name, {camera: given[camera] for camera in CAMERAS})
        batch = _shape("state", self.state, (None, None))[0]
        are_bytes = all(map(_is_bytes, self.images.values()))
        for camera in CAMERAS:
            image, mask = self.images[camera], self.image_masks[camera]
            _shape(f"images[{camera!r}]", image, (batch, IMAGE_SIZE, IMAGE_SIZE, 3))
            if not are_bytes:
                _dtype(f"images[{camera!r}]", image, "float")
            _shape(f"image_masks[{camera!r}]", mask, (batch,))
            _dtype(f"image_masks[{camera!r}]", mask, "bool")
        _dtype("state", self.state, "float")
        length = _shape("tokenized_prompt", self.tokenized_prompt, (batch, None))[1]
        _dtype("tokenized_prompt", self.tokenized_prompt, "int")
        _shape("tokenized_prompt_mask", self.tokenized_prompt_mask, (batch, length))
        _dtype("tokenized_prompt_mask", self.tokenized_prompt_mask, "bool")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], keep_bytes: bool = False) -> Self:
        """From openpi's dictionary, `{"image", "image_mask", "state", "tokenized_prompt", ...}`.

        Takes NumPy arrays of one batch. Images may be uint8 (x becomes x / 255 * 2 - 1) and of any
        size: others than 224x224 are resized with their aspect kept, and padded. A camera without
        an entry in "image_mask" is there; a camera without an image is not.

        Args:
            data: openpi's.
            keep_bytes: leave images as they are where all are uint8 and of the model's size: a
                quarter of what has to reach the device.

        Raises:
            ValueError: a key is missing or unknown, or an array does not fit.
        """
        required = ("image", "state", "tokenized_prompt", "tokenized_prompt_mask")
        if missing := [key for key in required if key not in data]:
            raise ValueError(f"observation: expected the keys {list(required)}, missing {missing}")
        masks = data.get("image_mask", {})
        if unknown := (set(data["image"]) | set(masks)) - set(CAMERAS):
            raise ValueError(f"image: expected cameras of {list(CAMERAS)}, got {sorted(unknown)}")
        batch = len(data["state"])
        shape = (batch, IMAGE_SIZE, IMAGE_SIZE, 3)
        given = {camera: np.asarray(image) for camera, image in data["image"].items()}
        if keep_bytes and all(_is_bytes(x) and x.shape == shape for x in given.values()):
            black = np.zeros(shape, np.uint8)
        else:
            given = {camera: _as_model_image(camera, image) for camera, image in given.items()}
            black = np.full(shape, -1.0, np.float32) if len(given) < len(CAMERAS) else None
        images = {camera: given.get(camera, black) for camera in CAMERAS}
        present = {
            camera: np.asarray(
                masks.get(camera, np.full(batch, camera in data["image"])), dtype=bool
            )
            & (camera in data["image"])
            for camera in CAMERAS
        }
        return cls(
            images=images,
            image_masks=present,
            state=np.asarray(data["state"]),
            tokenized_prompt=np.asarray(data["tokenized_prompt"]),
            tokenized_prompt_mask=np.asarray(data["tokenized_prompt_mask"]),
        )

    @property
    def batch_size(self) -> int:
        return self.state.shape[0]

    def map(self, function: Callable[[Array], Array], checked: bool = True) -> Self:
        """The same observation with `function` applied to every array.

        Args:
            function: of an array.
            checked: whether the results are; what leaves shapes and kinds alone need not be.
        """
        mapped = object.__new__(type(self))
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            if isinstance(given, Mapping):
                value = {name: function(array) for name, array in given.items()}
            else:
                value = function(given)
            object.__setattr__(mapped, field.name, value)
        if checked:
            mapped.__post_init__()
        return mapped

    def check(self, config: Pi0Config) -> None:
        """Raises ValueError unless the state and the prompt have the config's sizes."""
        _shape("state", self.state, (self.batch_size, config.action_dim))
        length = self.tokenized_prompt.shape[1]
        if length > config.max_token_len:
            raise ValueError(
                f"tokenized_prompt: expected at most max_token_len={config.max_token_len} tokens, "
                f"got {length}"
            )


@dataclasses.dataclass(frozen=True)
class EncodingPlan:
    """What of an observation must be encoded at all; leaving out the rest changes no result.

    Attributes:
        cameras: those that any sample of the batch has.
        prompt_length: tokens of the longest prompt, up to the next bucket.
    """

    cameras: tuple[str, ...]
    prompt_length: int


def plan_encoding(
    camera_mask: Bool[np.ndarray, "B C"], prompt_mask: Bool[np.ndarray, "B L"]
) -> EncodingPlan:
    """The plan for a batch. A batch without any camera keeps the first, masked as it is."""
    return _plan(camera_mask.tobytes(), prompt_mask.tobytes(), prompt_mask.shape[1])


@functools.lru_cache  # of a robot that is told the same again and again
def _plan(camera_mask: bytes, prompt_mask: bytes, length: int) -> EncodingPlan:
    batch = len(camera_mask) // len(CAMERAS)
    seen: Any = np.frombuffer(camera_mask, bool).reshape(batch, len(CAMERAS)).any(axis=0)
    places = np.flatnonzero(np.frombuffer(prompt_mask, bool).reshape(batch, length).any(axis=0))
    longest = int(places[-1]) + 1 if places.size else 0
    return EncodingPlan(
        cameras=tuple(itertools.compress(CAMERAS, seen)) or CAMERAS[:1],
        prompt_length=bucket(longest, PROMPT_BUCKETS, limit=length),
    )


def check_actions(name: str, actions: Array, batch: int, config: Pi0Config) -> None:
    """Raises ValueError unless `actions` is [batch, action_horizon, action_dim]."""
    _shape(name, actions, (batch, config.action_horizon, config.action_dim))


def _as_model_image(camera: str, image: np.ndarray) -> np.ndarray:
    if image.ndim != 4 or image.shape[-1] != 3:
        raise ValueError(
            f"image[{camera!r}]: expected the shape [B, height, width, 3], got {list(image.shape)}"
        )
    if image.dtype == np.uint8:
        # In place: new memory for each step costs nine times the arithmetic.
        image = image.astype(np.float32)
        image /= 255.0
        image *= 2.0
        image -= 1.0
    if image.shape[1:3] != (IMAGE_SIZE, IMAGE_SIZE):
        image = resize_with_pad(image, IMAGE_SIZE, IMAGE_SIZE)
    return image


def _shape(name: str, array: Array, expected: tuple[int | None, ...]) -> tuple[int, ...]:
    """The array's shape; None in `expected` stands for any length."""
    found = tuple(array.shape)
    if found == expected:
        return found
    fits = len(found) == len(expected) and all(
        want in (None, have) for want, have in zip(expected, found, strict=True)
    )
    if not fits:
        wanted = ["any" if length is None else length for length in expected]
        raise ValueError(f"{name}: expected the shape {wanted}, got {list(found)}")
    return found


def _dtype(name: str, array: Array, kind: str) -> None:
    """`kind` is what the dtype's name must hold: "float", "int" or "bool"."""
    found = _dtype_name(array)
    if kind not in found or found == "uint8":
        raise ValueError(f"{name}: expected a dtype of kind {kind}, got {found}")


def _is_bytes(image: Array) -> bool:
    return _dtype_name(image) == "uint8"


def _dtype_name(array: Array) -> str:
    return str(array.dtype).removeprefix("torch.")
