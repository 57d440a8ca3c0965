"""Tensors into a file's order and dtype, a block of rows at a time.

A transposed view is read along its own memory, a strip at a time, into a scratch that fits the
processor's caches, and transposed from there; both are used again and again. That is several times
faster than NumPy's copy across its memory into fresh one.
"""

from collections.abc import Callable

import ml_dtypes
import numpy as np

_BLOCK = 8 << 20  # bytes of the target that are put in order at once
_ROWS, _COLUMNS = 512, 256  # of the target that are transposed at once
# Numbers between the rows of a strip. The rows of weights are powers of two apart, which is where a
# processor's cache keeps few lines at a time.
_GAP = 16

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
        copy(target, view)
        write(start, target)


@np.errstate(over="ignore", invalid="ignore")  # what that leaves, the writers refuse by name
def copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copies and casts; `target` is contiguous, `source` may be transposed in its last two axes."""
    if source.ndim < 2 or source.strides[-2] >= source.strides[-1]:
        np.copyto(target, source, casting="unsafe")
    elif source.ndim > 2:
        for part, of in zip(target, source, strict=True):
            copy(part, of)
    else:
        _transpose(target, source)


def _transpose(target: np.ndarray, source: np.ndarray) -> None:
    scratch = np.empty((_COLUMNS, _ROWS + _GAP), target.dtype)
    for row in range(0, target.shape[0], _ROWS):
        for column in range(0, target.shape[1], _COLUMNS):
            where = (slice(row, row + _ROWS), slice(column, column + _COLUMNS))
            tile = source[where].T
            strip = scratch[: tile.shape[0], : tile.shape[1]]
            np.copyto(strip, tile, casting="unsafe")
            target[where] = strip.T


def is_finite(array: np.ndarray) -> bool:
    """Whether no number is infinite or NaN, for a contiguous array."""
    if array.dtype in _EXPONENT:
        mask = _EXPONENT[array.dtype]
        return not bool((array.view(np.uint16) & mask == mask).any())
    # A sum is finite only if every term is, and takes a fraction of the time of looking at each.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(array.sum())) or bool(np.isfinite(array).all())
