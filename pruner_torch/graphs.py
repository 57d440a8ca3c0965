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
    """A captured call: its memory, what it reads, and what it writes at every replay."""

    graph: Any
    pool: Any
    inputs: tuple[Tensor, ...]
    outputs: Any


class Graphs:
    """A bounded cache of captured calls.

    Those of a stage share their memory: a replay may overwrite what another one has given. Those of
    two stages do not, since one reads what the other gave, whichever was captured first.

    Args:
        device: a CUDA device.
        most: calls that are kept; the least recently used goes first.
    """

    def __init__(self, device: torch.device, most: int) -> None:
        self._device, self._most = device, most
        self._graphs: OrderedDict[tuple[str, Hashable], _Graph] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(
        self,
        stage: str,
        key: Hashable,
        function: Callable[..., Any],
        fresh: tuple[Tensor, ...],
        standing: tuple[Tensor, ...] = (),
    ) -> Any:
        """`function(*fresh, *standing)`, captured at the first call of a key.

        Args:
            stage: the part of a call that the function is.
            key: of the shapes of its inputs, and of all else it depends on.
            function: of tensors; waits for nothing, and returns a tree of tensors.
            fresh: inputs that are new at every call, on any device; they are copied.
            standing: inputs that are another graph's outputs, read where they are.

        Returns:
            The function's result, which the next call of this stage overwrites.
        """
        found = self._graphs.get((stage, key))
        if found is None:
            pool = self._pool_of(stage)
            found = self._graphs[stage, key] = self._capture(pool, function, fresh, standing)
            if len(self._graphs) > self._most:
                self._graphs.popitem(last=False)
        else:
            self._graphs.move_to_end((stage, key))
            _refresh(found.inputs, (*fresh, *standing))
        found.graph.replay()
        return found.outputs

    def _pool_of(self, stage: str) -> Any:
        """The stage's memory; of one that has no graph any more, a new one."""
        pools = (graph.pool for (each, _), graph in self._graphs.items() if each == stage)
        return next(pools, None) or torch.cuda.graph_pool_handle()

    # Under a caller's inference mode the inputs would be tensors that nobody may write to later.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _capture(
        self,
        pool: Any,
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
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            outputs = function(*inputs)
        return _Graph(graph, pool, inputs, outputs)


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
