"""From the tensors of one layout to those of another, a layer at a time.

The rows of both layouts meet in our parameters. A group is the rows that share some, such as
openpi's `kv_einsum` on one side and `k_proj` and `v_proj` on the other: for each layer, all that a
group has is read, split into our arrays, and merged into the tensors of the other side. What is in
memory is a layer of each of the two groups that are converted at a time.
"""

import concurrent.futures
import dataclasses
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from convert.blocks import copy
from convert.lazy_array import LazyArray
from pruner_spec import lora
from pruner_spec.config import Pi0Config
from pruner_spec.layout import Layout
from pruner_spec.layout_row import Row
from pruner_spec.parameters import parameter_table

Write = Callable[[str, int | None, np.ndarray], None]

_STREAMED = 16 << 20  # bytes of a table that are in memory at once
_AT_ONCE = 2  # groups; more would take more memory than they save time


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of a conversion: a layout, and the model whose tensors it has."""

    layout: Layout
    config: Pi0Config


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that share parameters.

    Attributes:
        sources, targets: the rows, by side.
        layers: how many there are; None for parameters that stand alone.
    """

    sources: tuple[Row, ...]
    targets: tuple[Row, ...]
    layers: int | None

    @property
    def is_copy(self) -> bool:
        """Whether the one tensor here is the other, number by number."""
        rows = (*self.sources, *self.targets)
        return len(rows) == 2 and self.layers is None and all(_is_identity(row) for row in rows)


def _is_identity(row: Row) -> bool:
    theirs, ours = row.sides
    return theirs == ours and "(" not in theirs


def groups(source: Side, target: Side) -> list[Group]:
    """All rows of both sides.

    The model of the target is the source's, or the source's with its adapters merged.
    """
    table = parameter_table(source.config)
    merged = table.keys() - parameter_table(target.config).keys()
    members: dict[str, set[str]] = {}  # the names that have to be there together, by each of them
    for row in (*source.layout.rows_of(source.config), *target.layout.rows_of(target.config)):
        _unite(members, row.ours)
    for kernel in table:
        factors = lora.adapter_names(kernel)
        if factors[0] in merged:
            _unite(members, (kernel, *factors))
    found = []
    for names in {id(names): names for names in members.values()}.values():
        sources, targets = (
            tuple(row for row in side.layout.rows_of(side.config) if names & set(row.ours))
            for side in (source, target)
        )
        found.append(Group(sources, targets, table[min(names)].layers))
    return found


def _unite(members: dict[str, set[str]], names: tuple[str, ...]) -> None:
    together = set(names).union(*(members.get(name, set()) for name in names))
    members.update(dict.fromkeys(together, together))


def convert_all(arrays: Mapping[str, LazyArray], source: Side, target: Side, write: Write) -> None:
    """Converts all groups, two at a time and the largest first, so that both end together.

    Args:
        arrays, source, target: as for `convert_group`.
        write: as for `convert_group`; two threads call it side by side, of different tensors.
    """
    failed = threading.Event()

    def write_or_stop(name: str, start: int | None, array: np.ndarray) -> None:
        if failed.is_set():
            raise concurrent.futures.CancelledError
        write(name, start, array)

    def size(group: Group) -> int:
        names = [name for row in group.sources for name in row.names(source.config)]
        return sum(arrays[name].nbytes for name in names)

    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        tasks = [
            pool.submit(convert_group, group, arrays, source, target, write_or_stop)
            for group in sorted(groups(source, target), key=size, reverse=True)
        ]
        try:
            for task in concurrent.futures.as_completed(tasks):
                task.result()
        except BaseException:
            failed.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def convert_group(
    group: Group, arrays: Mapping[str, LazyArray], source: Side, target: Side, write: Write
) -> None:
    """Converts what a group has.

    Args:
        group: of `groups(source, target)`.
        arrays: the source's tensors by the names of its rows.
        source, target: as for `groups`.
        write: takes the target's tensors: a name, the first row of what is given (None for a whole
            tensor), and the numbers, which may be a view, and are overwritten later.
    """
    if group.is_copy:
        name, target_name = group.sources[0].theirs, group.targets[0].theirs
        _copy(arrays[name], lambda start, rows: write(target_name, start, rows))
        return
    layers = [_layers(row, arrays, source.config) for row in group.sources]
    stacks: dict[Any, np.ndarray] = {}
    kept = parameter_table(target.config).keys()
    for layer in range(group.layers or 1):
        ours: dict[str, np.ndarray] = {}
        for row, tensors in zip(group.sources, layers, strict=True):
            ours |= zip(row.ours, _one_layer(row).split(next(tensors), source.config), strict=True)
        _merge_adapters(ours, source.config, kept)
        for row in group.targets:
            parts = [ours[name] for name in row.ours]
            tensor = _merge(_one_layer(row), parts, target.config, stacks)
            if _is_stacked(row):
                write(row.theirs, layer, tensor[None])
            else:
                write(row.theirs.format(layer=layer), None, tensor)


def _copy(array: LazyArray, write: Callable[[int, np.ndarray], None]) -> None:
    rows = max(1, _STREAMED // max(1, array.nbytes // max(1, array.shape[0])))
    start = 0
    for piece in ahead(array.pieces(rows)):
        write(start, piece)
        start += len(piece)


def _layers(row: Row, arrays: Mapping[str, LazyArray], config: Pi0Config) -> Iterator[np.ndarray]:
    """A row's tensor layer by layer, or the one that it is."""
    if _is_stacked(row):
        return (piece[0] for piece in ahead(arrays[row.theirs].pieces(1)))
    return _in_turn([arrays[name] for name in row.names(config)])


def _in_turn(arrays: Sequence[LazyArray]) -> Iterator[np.ndarray]:
    """Whole arrays of one shape, each read into the memory of the one before."""
    memory = None
    for array in arrays:
        if array.fill is None:
            yield np.asarray(array)
            continue
        if memory is None or memory.dtype != array.dtype:
            memory = np.empty(array.shape, array.dtype)
        array.fill(memory)
        yield memory


def _merge(
    row: Row, parts: Sequence[np.ndarray], config: Pi0Config, stacks: dict[Any, np.ndarray]
) -> np.ndarray:
    """As `row.merge`; parts are put on each other in the same memory for every layer."""
    if len(parts) == 1:
        return row.merge(parts, config)
    dtype = np.result_type(*(part.dtype for part in parts))
    stack = stacks.get((row.theirs, dtype))
    if stack is None:
        stack = stacks[row.theirs, dtype] = np.empty((len(parts), *parts[0].shape), dtype)
    for place, part in zip(stack, parts, strict=True):
        copy(place, part)
    # To a row with one parameter, the stack is the array that has the axis `two` already.
    return dataclasses.replace(row, ours=row.ours[:1]).merge([stack], config)


def _is_stacked(row: Row) -> bool:
    return "l" in row.pattern.split()


def _one_layer(row: Row) -> Row:
    return row.of_one_layer() if _is_stacked(row) else row


def ahead(pieces: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same pieces, the next one read while one is used."""

    def read() -> np.ndarray | None:
        return next(pieces, None)

    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        coming = reader.submit(read)
        while (piece := coming.result()) is not None:
            coming = reader.submit(read)
            yield piece


def _merge_adapters(ours: dict[str, np.ndarray], config: Pi0Config, kept: Collection[str]) -> None:
    """Adds adapters that are not kept to their kernels, in float32."""
    for kernel in list(ours):
        factors = lora.adapter_names(kernel)
        if factors[0] in kept or factors[0] not in ours:
            continue
        expert = config.action_expert if kernel.startswith("gemma.action.") else config.paligemma
        assert expert.lora is not None
        scale = lora.adapter_scale(kernel, expert.lora)
        a, b = (ours.pop(name).astype(np.float32) for name in factors)
        ours[kernel] = ours[kernel].astype(np.float32) + lora.delta(kernel, a, b, scale)
