"""Denoising steps on Hopper: one custom call, which launches all that `few_rows` has for them.

Launches overlap, each asking for its weights while the one before it runs; XLA makes none that do.
So a `Chain` takes the place of `kernels`: its methods, of the same names and arguments, launch
nothing, but note what is to be launched. What they are given and return are `Buffer`s, places in
memory that there is not yet. `Chain.run` then has a program of it all, for `ffi_handler` to run.

Rows are packed, as `few_rows.cu` reads them.

Dimension letters: as in `kernels`.
"""

import dataclasses
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pruner_jax import ffi_handler
from pruner_jax.kernels_plain import Rows
from pruner_jax.tables import TableRow
from pruner_kernels import few_rows
from pruner_kernels.few_rows import Launch, packed_shape
from pruner_kernels.program import Copy, Place, Program, Runner
from pruner_kernels.tiles import cdiv

ALIGNMENT = 128  # bytes, as XLA's own buffers have it

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True, eq=False)
class Memory:
    """What a program finds, or what it has for itself: then `array` is None.

    Attributes:
        size: bytes.
        array: an operand.
        written: whether it is a result, too.
    """

    size: int
    array: Any = None
    written: bool = False


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array in some memory, as far as its shape; how it lies, those know that are given it.

    Attributes:
        outputs_first: whether this is the transpose of what lies there.
        offset: bytes, of its beginning.
    """

    memory: Memory
    shape: tuple[int, ...]
    dtype: np.dtype
    outputs_first: bool = False
    offset: int = 0

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def T(self) -> "Buffer":
        shape, turned = self.shape[::-1], not self.outputs_first
        return dataclasses.replace(self, shape=shape, outputs_first=turned)

    def reshape(self, *shape: int) -> "Buffer":
        """The elements in this order, in another shape, of which one size may be -1."""
        others = abs(math.prod(shape))
        found = tuple(math.prod(self.shape) // others if size == -1 else size for size in shape)
        return dataclasses.replace(self, shape=found)

    def behind(self, place: int) -> "Buffer":
        """From so many of its elements on, in the order in which they lie."""
        return dataclasses.replace(self, offset=self.offset + place * self.dtype.itemsize)


class Chain:
    """The launches of all denoising steps, one after the other.

    Args:
        graphs: whether a CUDA graph of them is replayed.
    """

    def __init__(self, graphs: bool = True) -> None:
        self._graphs = graphs
        self._launches: list[tuple[Launch, tuple[Buffer, ...]]] = []
        self._copies: list[tuple[Buffer, Buffer]] = []

    def read(self, tree: Tree) -> Tree:
        """A tree with a buffer for each of its arrays, which is an operand if it is read."""
        return jax.tree.map(lambda array: _operand(array), tree)

    def written(self, tree: Tree) -> Tree:
        """The same, of arrays that are written over: in place, if nobody else reads them."""
        return jax.tree.map(lambda array: _operand(array, written=True), tree)

    def copied(self, array: Array) -> Buffer:
        """An array that lies elsewhere at every call, which no graph could be captured with."""
        outside = _operand(array)
        inside = self._buffer(outside.shape, outside.dtype)
        self._copies.append((inside, outside))
        return inside

    def run(self, result: Buffer) -> Array:
        """Calls the program; the result is a copy, since that lies elsewhere at every call."""
        given = [source.memory for _, source in self._copies]
        given += [buffer.memory for _, buffers in self._launches for buffer in buffers]
        given = list(dict.fromkeys(given))
        operands = [memory for memory in given if memory.array is not None]
        written = [memory for memory in operands if memory.written]
        offsets, size = self._offsets([memory for memory in given if memory.array is None], result)
        # Pointers are those of operands, of the result, of what is written, of the scratch.
        first = len(operands) + 1
        places: dict[Memory, Place] = {memory: (i, 0) for i, memory in enumerate(operands)}
        places |= {memory: (first + i, 0) for i, memory in enumerate(written)}
        scratch = first + len(written)
        places |= {memory: (scratch, offset) for memory, offset in offsets.items()}
        call = jax.ffi.ffi_call(
            ffi_handler.TARGET,
            [
                jax.ShapeDtypeStruct(result.shape, result.dtype),
                *(jax.ShapeDtypeStruct(each.array.shape, each.array.dtype) for each in written),
                jax.ShapeDtypeStruct((size,), jnp.uint8),
            ],
            input_output_aliases={operands.index(each): 1 + i for i, each in enumerate(written)},
        )
        program = self._registered(places, result, (len(operands), 0))
        return call(*(memory.array for memory in operands), program=program)[0]

    def _registered(self, places: dict[Memory, Place], result: Buffer, to: Place) -> str:
        """The key of the program, which copies its result to a place, for `ffi_handler` to find."""

        def place(buffer: Buffer) -> Place:
            which, offset = places[buffer.memory]
            return which, offset + buffer.offset

        program = Program(
            tuple((launch, tuple(map(place, buffers))) for launch, buffers in self._launches),
            tuple(Copy(place(to), place(source), to.memory.size) for to, source in self._copies),
            (Copy(to, place(result), result.memory.size),),
            self._graphs,
        )
        ffi_handler.register()
        if program.key not in ffi_handler.programs:
            ffi_handler.programs[program.key] = Runner(program)
        return program.key

    def embed_actions(
        self, noisy: Buffer, kernel: Buffer, bias: Buffer, scale: TableRow, dtype: jnp.dtype
    ) -> Rows:
        """`kernels.embed_actions`."""
        actions, width = kernel.shape
        count = math.prod(noisy.shape) // actions
        rows = self._rows(count, width, 1, np.dtype(dtype))
        launch = few_rows.embed_actions(count, actions, width)
        self._launch(launch, noisy, kernel, bias, _row(scale), rows.x, rows.scaled, rows.squares)
        return rows

    def project(
        self,
        rows: Rows,
        kernel: Buffer,
        added: TableRow,
        cos: Buffer,
        sin: Buffer,
        key: Buffer,
        value: Buffer,
        place: int,
        num_heads: int,
    ) -> tuple[Buffer, Buffer, Buffer]:
        """`kernels.project`."""
        (batch, length), (_, room, _, head_dim) = cos.shape[:2], key.shape
        shape = batch, length, num_heads, head_dim
        query = self._buffer(shape, key.dtype, few_rows.queries_shape(*shape))
        to = key, value
        # Of one sample they begin at its first token, so that all prefixes have one launch.
        if batch == 1:
            to = tuple(each.behind(place * head_dim) for each in to)
            room, place = length, 0
        count, width = rows.x.shape
        launch = few_rows.project(
            count, width, len(rows.squares), num_heads, head_dim, length, room, place, True
        )
        given = rows.scaled, rows.squares, _stored(kernel), _row(added), cos, sin, query, *to
        self._launch(launch, *given)
        return query, key, value

    def attend(self, query: Buffer, key: Buffer, value: Buffer, key_mask: Buffer) -> Buffer:
        """`kernels.attend`."""
        (batch, length, heads, head_dim), keys = query.shape, key_mask.shape[1]
        rows, width = batch * length, heads * head_dim
        out = self._buffer((batch, length, width), key.dtype, packed_shape(rows, width))
        room = keys if batch == 1 else key.shape[1]
        launch = few_rows.attend(batch, length, heads, head_dim, keys, room, True)
        self._launch(launch, query, key, value, key_mask, out)
        return out

    def gated(self, rows: Rows, gate_up: Buffer, added: TableRow) -> Buffer:
        """`kernels.gated`."""
        (count, width), places = rows.x.shape, gate_up.shape[1] // 2
        out = self._buffer((count, places), rows.x.dtype, packed_shape(count, places))
        launch = few_rows.gated(count, width, len(rows.squares), places)
        self._launch(launch, rows.scaled, rows.squares, _stored(gate_up), _row(added), out)
        return out

    def merge(
        self, x: Buffer, kernel: Buffer, residual: Any, gate: TableRow, scale: TableRow
    ) -> Rows:
        """`kernels.merge`."""
        (count, width), inputs = residual.shape, len(kernel)
        rows = self._rows(count, width, width // 64, residual.dtype)
        vectors = _row(gate, residual.dtype), _row(scale)
        launch = few_rows.merge(count, inputs, width)
        written = rows.x, rows.scaled, rows.squares
        self._launch(launch, x, _stored(kernel), residual, *vectors, *written)
        return rows

    def euler_step(
        self,
        rows: Rows,
        scale: TableRow,
        shift: TableRow,
        kernel: Buffer,
        bias: Buffer,
        noisy: Buffer,
        step: float,
    ) -> Buffer:
        """`kernels.euler_step`, over the noisy actions."""
        (count, width), parts = rows.x.shape, len(rows.squares)
        launch = few_rows.euler_step(count, width, parts, kernel.shape[1], step)
        norm = rows.x, rows.squares, _row(scale), _row(shift)
        self._launch(launch, *norm, kernel, bias, noisy, noisy)
        return noisy

    def _launch(self, launch: Launch, *given: Any) -> None:
        self._launches.append((launch, given))

    def _rows(self, count: int, width: int, parts: int, dtype: np.dtype) -> Any:
        x = self._buffer((count, width), dtype)
        scaled = self._buffer(x.shape, dtype, packed_shape(count, width))
        squares = self._buffer((parts, count), np.dtype(np.float32))
        given: Any = x, scaled, squares
        return Rows(*given)

    def _buffer(
        self, shape: tuple[int, ...], dtype: np.dtype, lies: tuple[int, ...] | None = None
    ) -> Buffer:
        """In the scratch, as large as the shape in which it lies there."""
        size = math.prod(shape if lies is None else lies) * dtype.itemsize
        return Buffer(Memory(size), shape, dtype)

    def _offsets(self, memories: list[Memory], result: Buffer) -> tuple[dict[Memory, int], int]:
        """Where each memory lies in the scratch, and how large that is.

        Two share a place where the launches that use the one come before those that use the other:
        a launch writes once the one before it is done.
        """
        first, last = {}, {result.memory: len(self._launches)}
        for place, (_, given) in reversed(list(enumerate(self._launches))):
            for buffer in given:
                first[buffer.memory] = place
                last.setdefault(buffer.memory, place)
        first |= {to.memory: -1 for to, _ in self._copies}
        offsets: dict[Memory, int] = {}
        for memory in sorted(memories, key=first.__getitem__):
            offset = 0
            for other in sorted(offsets, key=offsets.__getitem__):
                gone = last[other] < first[memory]
                if not gone and offsets[other] < offset + _aligned(memory.size):
                    offset = max(offset, offsets[other] + _aligned(other.size))
            offsets[memory] = offset
        return offsets, max(offset + _aligned(memory.size) for memory, offset in offsets.items())


def _operand(array: Any, written: bool = False) -> Buffer:
    size = math.prod(array.shape) * array.dtype.itemsize
    return Buffer(Memory(size, array, written), tuple(array.shape), np.dtype(array.dtype))


def _row(vector: Any, dtype: Any = np.float32) -> Buffer:
    """A row of a table, in memory.

    Raises:
        ValueError: there is none, or one of another dtype.
    """
    if not isinstance(vector, TableRow) or vector.table.dtype != dtype:
        found = f"one in {vector.table.dtype}" if isinstance(vector, TableRow) else vector
        raise ValueError(f"expected a row of a table in {np.dtype(dtype)}, got {found}")
    table: Any = vector.table
    return table.behind(int(vector.place) * table.shape[1])


def _stored(kernel: Buffer) -> Buffer:
    """A kernel as it lies in memory, outputs first."""
    if not kernel.outputs_first:
        raise ValueError(f"expected the transpose of a kernel, got one of {kernel.shape}")
    return kernel


def _aligned(size: int) -> int:
    return cdiv(size, ALIGNMENT) * ALIGNMENT
