"""CUDA graphs of functions of static shapes: one launch in the place of thousands."""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

# Before capture: kernels are loaded, and libraries choose theirs and allocate their workspaces.
_WARM_UP_CALLS = 2


@dataclasses.dataclass(frozen=True)
class _Graph:
    """A captured call: what it reads, and what it writes at every replay."""

    graph: Any
    inputs: tuple[Tensor, ...]
    outputs: Any


class Graphs:
    """A bounded cache of captured calls, which share their working memory.

    Args:
        device: a CUDA device.
        most: calls that are kept; the least recently used goes first.
    """

    def __init__(self, device: torch.device, most: int) -> None:
        self._device, self._most = device, most
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(
        self,
        key: Hashable,
        function: Callable[..., Any],
        fresh: tuple[Tensor, ...],
        standing: tuple[Tensor, ...] = (),
    ) -> Any:
        """`function(*fresh, *standing)`, captured at the first call of a key.

        Args:
            key: of the function, of the shapes of its inputs, and of all else it depends on.
            function: of tensors; waits for nothing, and returns a tree of tensors.
            fresh: inputs that are new at every call, on any device; they are copied.
            standing: inputs that are another graph's outputs, read where they are.

        Returns:
            The function's result, which the next call of this key overwrites.
        """
        found = self._graphs.get(key)
        if found is None:
            found = self._graphs[key] = self._capture(function, fresh, standing)
            if len(self._graphs) > self._most:
                self._graphs.popitem(last=False)
        else:
            self._graphs.move_to_end(key)
            _refresh(found.inputs, (*fresh, *standing))
        found.graph.replay()
        return found.outputs

    # Under a caller's inference mode the inputs would be tensors that nobody may write to later.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _capture(
        self,
        function: Callable[..., Any],
        fresh: tuple[Tensor, ...],
        standing: tuple[Tensor, ...],
    ) -> _Graph:
        inputs = (*(x.to(self._device, copy=True) for x in fresh), *standing)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_CALLS):
                function(*inputs)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = function(*inputs)
        return _Graph(graph, inputs, outputs)


def _refresh(inputs: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> None:
    """Copies what is not there already; what the device has in one launch a dtype."""
    alike: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for mine, new in zip(inputs, given, strict=True):
        if mine.data_ptr() != new.data_ptr():
            kind = (new.dtype, new.device)
            to, sources = alike.setdefault(kind, ([], []))
            to.append(mine)
            sources.append(new)
    for to, sources in alike.values():
        torch._foreach_copy_(to, sources, non_blocking=True)
