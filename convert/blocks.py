"""Tensors into a file's order and dtype, a block of rows at a time.

A transposed view is read across its memory and written along the file's. In tiles that fit the
processor's caches, through one block that is used again and again, that is several times faster
than NumPy's copy into fresh memory.
"""

from collections.abc import Callable

import ml_dtypes
import numpy as np

_BLOCK = 2 << 20  # bytes of the target that are put in order at once
_TILE = 128  # rows and columns of a tile

_EXPONENT = {np.dtype(ml_dtypes.bfloat16): 0x7F80, np.dtype(np.float16): 0x7C00}


def block_rows(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """How many rows of a tensor make a block."""
    row = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
    return max(1, _BLOCK // max(1, row))


def blocks(tensor: np.ndarray, dtype: np.dtype, write: Callable[[int, np.ndarray], None]) -> None:
    """Gives a tensor's rows in order, cast: `write(first_row, rows)`, rows contiguous.

    The rows are overwritten once `write` returns.
    """
    if tensor.ndim == 0:
        write(0, np.array(tensor, dtype))
        return
    rows = min(block_rows(tensor.shape, dtype), max(1, len(tensor)))
    block = np.empty((rows, *tensor.shape[1:]), dtype)
    for start in range(0, len(tensor), rows):
        view = tensor[start : start + rows]
        target = block[: len(view)]
        _copy(target, view)
        write(start, target)


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    if source.ndim != 2 or source.strides[0] >= source.strides[1]:
        np.copyto(target, source, casting="unsafe")
        return
    for column in range(0, source.shape[1], _TILE):
        for row in range(0, source.shape[0], _TILE):
            tile = (slice(row, row + _TILE), slice(column, column + _TILE))
            np.copyto(target[tile], source[tile], casting="unsafe")


def is_finite(array: np.ndarray) -> bool:
    """Whether no number is infinite or NaN, for a contiguous array."""
    if array.dtype in _EXPONENT:
        mask = _EXPONENT[array.dtype]
        return not bool((array.view(np.uint16) & mask == mask).any())
    # A sum is finite only if every term is, and takes a fraction of the time of looking at each.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(array.sum())) or bool(np.isfinite(array).all())
