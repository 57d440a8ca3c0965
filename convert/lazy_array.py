"""An array that is read when it is used: whole, in part, or from its first row to its last."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Pieces = Callable[[int], Iterator[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array on disk; `np.asarray` reads all of it, and an index a part.

    Attributes:
        shape: of the whole array.
        dtype: as stored; bfloat16 is ml_dtypes'.
        read: reads what an index selects.
        stream: see `pieces`; None where an index costs no more than what it selects.
        chunks: the shape of what is stored in one piece; None for the whole array.
        fill: reads all of it into a contiguous array; None where `read` is as good.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Any], np.ndarray]
    stream: Pieces | None = None
    chunks: tuple[int, ...] | None = None
    fill: Callable[[np.ndarray], object] | None = None

    @property
    def nbytes(self) -> int:
        """What the whole array takes in memory."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def pieces(self, rows: int) -> Iterator[np.ndarray]:
        """The array in order, at most `rows` of its first axis at a time, each stored byte once.

        A piece may be overwritten when the next but one is asked for: keep no more than two.
        """
        if self.stream is not None:
            return self.stream(rows)
        return (self.read(slice(start, start + rows)) for start in range(0, self.shape[0], rows))

    def __getitem__(self, index: int | slice) -> np.ndarray:
        return self.read(index)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy  # every read is a copy
        return self.read(...).astype(dtype or self.dtype, copy=False)
