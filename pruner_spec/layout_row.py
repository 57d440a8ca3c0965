"""A row of the weight map: which stored tensor holds which of our parameters, axis by axis.

A row's einops pattern leads from a tensor as it is stored to our array. The way back is the pattern
reversed, with its sizes from the config. `two` in a pattern means that the tensor holds two
parameters, in the order of the row's targets. `x` means that the stored matrix is made of as many
blocks as our array has heads: see `BlockRow`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal, Self

import numpy as np
from einops import rearrange

from pruner_spec.config import Pi0Config
from pruner_spec.parameters import Parameter, parameter_table

LEGEND = {
    "l": "layers",
    "d": "width of the tower or expert that the row belongs to",
    "f": "MLP width",
    "k": "heads",
    "g": "key/value heads",
    "h": "head dim",
    "m": "modulation of an adaptive norm, 3 * d: scale, shift, gate",
    "n": "patches of an image",
    "p": "pixel rows of a patch",
    "q": "pixel columns of a patch",
    "c": "colours of a pixel",
    "v": "vocabulary",
    "a": "action dim",
    "r": "rank of an adapter",
    "x": "blocks of an adapter's matrix, as many as heads",
    "i": "inputs",
    "o": "outputs",
    "two": "key and value, or gate and up",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter family.

    Attributes:
        theirs: the stored tensor's name; with `{layer}` where every layer has a tensor.
        ours: the parameters in it.
        pattern: einops, stored tensor -> our array. With `l` where all layers are in one tensor.
    """

    theirs: str
    ours: tuple[str, ...]
    pattern: str

    @property
    def is_per_layer(self) -> bool:
        return "{layer}" in self.theirs

    def belongs_to(self, config: Pi0Config) -> bool:
        """Whether the model has these parameters: π0 and π0.5 differ in some."""
        return all(name in _table(config) for name in self.ours)

    def names(self, config: Pi0Config) -> tuple[str, ...]:
        """The names of the stored tensors, layer by layer."""
        layers = _table(config)[self.ours[0]].layers if self.is_per_layer else 1
        return tuple(self.theirs.format(layer=layer) for layer in range(layers or 1))

    def shape(self, config: Pi0Config) -> tuple[int, ...]:
        """The shape of a stored tensor."""
        sizes = self._sizes(config)
        return tuple(_size(axis, sizes) for axis in axes(self.sides[0]))

    def split(self, stored: np.ndarray, config: Pi0Config) -> tuple[np.ndarray, ...]:
        """Our arrays from a stored tensor, one a target; views where NumPy can."""
        sizes = self._sizes(config)
        grouped = {axis: sizes[axis] for axis in _grouped(self.sides[0])}
        array = rearrange(stored, self.pattern, **grouped)
        return tuple(array) if len(self.ours) > 1 else (array,)

    def merge(self, arrays: Sequence[np.ndarray], config: Pi0Config) -> np.ndarray:
        """The stored tensor from our arrays, one a target: the inverse of `split`."""
        sizes = self._sizes(config)
        grouped = _grouped(self.sides[1])
        array = np.stack(arrays) if len(self.ours) > 1 else arrays[0]
        reverse = " -> ".join(reversed(self.sides))
        return rearrange(array, reverse, **{axis: sizes[axis] for axis in grouped})

    def of_one_layer(self) -> Self:
        """The row for one layer's slice of a tensor that holds them all, and of our arrays."""
        pattern = " ".join(token for token in self.pattern.split() if token != "l")
        return dataclasses.replace(self, pattern=pattern)

    @property
    def sides(self) -> tuple[str, str]:
        """The pattern's two sides: the stored tensor's axes, and ours."""
        theirs, _, ours = self.pattern.partition(" -> ")
        return theirs, ours

    def _sizes(self, config: Pi0Config) -> dict[str, int]:
        """The size of every axis, from the shape of our parameter and the config's head counts."""
        parameter = _table(config)[self.ours[0]]
        ours = axes(self.sides[1])
        shape = parameter.stacked_shape if "l" in ours else parameter.shape
        if "two" in ours:
            shape = (len(self.ours), *shape)
        return _group_sizes(parameter.name, config) | dict(zip(ours, shape, strict=True))


@dataclasses.dataclass(frozen=True)
class BlockRow(Row):
    """A factor of an adapter with heads, as PEFT has it: one matrix of x by x blocks.

    PEFT adds B · A to a weight [outputs, inputs] and knows no heads. Ours are on the first axis of
    our array. Where the blocks are "diagonal", head by head stands on the diagonal and zeros
    elsewhere; where they are "copies", the same blocks stand x times below each other, so that
    their product with the other factor sums over its heads.

    Attributes:
        blocks: which of the two.
    """

    blocks: Literal["diagonal", "copies"] = "diagonal"

    def _sizes(self, config: Pi0Config) -> dict[str, int]:
        return super()._sizes(config) | {"x": _table(config)[self.ours[0]].shape[0]}

    def split(self, stored: np.ndarray, config: Pi0Config) -> tuple[np.ndarray, ...]:
        """Our array.

        Raises:
            ValueError: the blocks are not as they must be.
        """
        sizes = self._sizes(config)
        theirs, ours = self.sides
        grouped = {axis: sizes[axis] for axis in _grouped(theirs)}
        every = rearrange(stored, f"{theirs} -> x {ours}", **grouped)
        heads = np.arange(len(every))
        array = every[0] if self.blocks == "copies" else every[heads, heads]
        if not np.array_equal(stored, self.merge([array], config), equal_nan=True):
            expected = (
                f"{len(heads)} equal blocks of rows"
                if self.blocks == "copies"
                else f"zeros outside the {len(heads)} blocks on its diagonal"
            )
            raise ValueError(
                f"{self.theirs}: expected {expected}, as in an adapter of openpi's, got others"
            )
        return (np.ascontiguousarray(array),)

    def merge(self, arrays: Sequence[np.ndarray], config: Pi0Config) -> np.ndarray:
        """The matrix."""
        (array,) = arrays
        heads = len(array)
        every = np.zeros((heads, *array.shape), array.dtype)
        if self.blocks == "copies":
            every[:] = array
        else:
            every[np.arange(heads), np.arange(heads)] = array
        theirs, ours = self.sides
        return rearrange(every, f"x {ours} -> {theirs}")


@functools.cache
def _table(config: Pi0Config) -> dict[str, Parameter]:
    return parameter_table(config)


def axes(side: str) -> list[str]:
    """The axes of one side of a pattern; a group such as "(k h)" is one."""
    return re.findall(r"\(.*?\)|\w+", side)


def _grouped(side: str) -> list[str]:
    """The axes in the groups of one side of a pattern."""
    return re.findall(r"\w+", " ".join(re.findall(r"\(.*?\)", side)))


def _size(axis: str, sizes: Mapping[str, int]) -> int:
    """The size of an axis, or of a group as the product of its axes."""
    if axis in sizes:
        return sizes[axis]
    return math.prod(1 if letter == "1" else sizes[letter] for letter in re.findall(r"\w+", axis))


def _group_sizes(name: str, config: Pi0Config) -> dict[str, int]:
    """Sizes of the axes that stand in groups on our side, for the module of the parameter."""
    if name.startswith("vision."):
        vision = config.vision
        heads = {"k": vision.num_heads, "h": vision.head_dim}
        return heads | {"p": vision.patch_size, "q": vision.patch_size, "c": 3}
    is_action = name.startswith("gemma.action.")
    expert = config.action_expert if is_action else config.paligemma
    return {"k": expert.num_heads, "g": expert.num_kv_heads, "h": expert.head_dim}
