"""Vectors as rows of a table: of a schedule's steps, and of many of a model's small parameters.

Handing an array to a compiled function takes the host 2 to 3 µs, however small it is, and the GPU
waits for the first function of a call. The vision tower alone has 216 biases and norms.
"""

import collections
import dataclasses
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Tree = TypeVar("Tree")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TableRow:
    """A row of a table, such as what a norm does at one of T steps.

    A kernel finds it in the table; XLA would launch a copy of it for every kernel that reads one.
    """

    table: Float[Array, "T N"]
    place: Int[Array, ""] | np.ndarray

    @property
    def value(self) -> Float[Array, "N"]:
        """The row itself."""
        return self.table[self.place]


def value_of(vector: Float[Array, "N"] | TableRow) -> Float[Array, "N"]:
    """A vector, wherever it is."""
    return vector.value if isinstance(vector, TableRow) else vector


def arguments_of(name: str, vector: Float[Array, "N"] | TableRow | None) -> dict[str, Any]:
    """What a kernel is given of a vector: an array, and which of its rows, if it is a table."""
    if isinstance(vector, TableRow):
        return {name: vector.table, f"{name}_row": vector.place}
    return {name: vector, f"{name}_row": None}


class Gathered(Generic[Tree]):
    """The arrays of a tree, its vectors of one size and dtype as one table.

    Attributes:
        arrays: tables, then all else; copies of what is in tables.
    """

    def __init__(self, tree: Tree) -> None:
        leaves, self._structure = jax.tree.flatten(tree)
        kinds: list[Any] = [leaf.ndim == 1 and (leaf.shape, leaf.dtype) for leaf in leaves]
        counts = collections.Counter(kind for kind in kinds if kind)
        tables: dict[Any, list[Array]] = {kind: [] for kind, n in counts.items() if n > 1}
        order = list(tables)
        others: list[Array] = []
        self._places: list[tuple[int, int | None]] = []  # among the arrays, and in a table
        for leaf, kind in zip(leaves, kinds, strict=True):
            if kind in tables:
                self._places.append((order.index(kind), len(tables[kind])))
                tables[kind].append(leaf)
            else:
                self._places.append((len(tables) + len(others), None))
                others.append(leaf)
        self.arrays = (*(jnp.stack(rows) for rows in tables.values()), *others)

    def tree(self, arrays: tuple[Array, ...]) -> Tree:
        """The tree, of `arrays` such as its own; each vector of a table is a `TableRow`."""
        leaves = [
            arrays[array] if row is None else TableRow(arrays[array], np.asarray(row, np.int32))
            for array, row in self._places
        ]
        return jax.tree.unflatten(self._structure, leaves)
