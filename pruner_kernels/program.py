"""Launches of `few_rows`, one after another, known before there is any memory: a program.

A framework says where that lies when it is run. As a CUDA graph it takes the host one launch.
"""

import collections
import dataclasses
import functools
import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

from pruner_kernels import driver
from pruner_kernels.few_rows import Launch

MAX_GRAPHS = 8  # of a program; each is for other addresses

Place = tuple[int, int]  # which of the pointers that a program is given, and how many bytes on


@dataclasses.dataclass(frozen=True)
class Copy:
    """Of `size` bytes."""

    to: Place
    source: Place
    size: int


@dataclasses.dataclass(frozen=True)
class Program:
    """What is launched, in this order.

    Attributes:
        launches: each with the places that its parameters point to.
        before, after: copies of what lies elsewhere at every call, no part of a graph.
        graphs: whether the launches are captured and replayed, or made anew at every call.
    """

    launches: tuple[tuple[Launch, tuple[Place, ...]], ...]
    before: tuple[Copy, ...] = ()
    after: tuple[Copy, ...] = ()
    graphs: bool = True

    @functools.cached_property
    def key(self) -> str:
        """Of its content, the same in every process."""
        return hashlib.sha256(repr(self).encode()).hexdigest()


class Runner:
    """Runs a program on a GPU. May be called by several threads.

    Attributes:
        captures: how often a graph was captured; once for all calls with the same addresses.
    """

    def __init__(self, program: Program) -> None:
        self.captures = 0
        self._program = program
        self._read = sorted({which for _, places in program.launches for which, _ in places})
        self._graphs: collections.OrderedDict[tuple[int, ...], Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, pointers: Sequence[int], stream_of: Callable[[], int]) -> None:
        """Launches everything.

        Args:
            pointers: addresses on the device.
            stream_of: gives the handle of the stream.
        """
        stream = stream_of()
        with self._lock, driver.device_of(stream) as device:
            _copy(self._program.before, pointers, stream)
            if self._program.graphs:
                driver.replay(self._graph(pointers, device), stream)
            else:
                self._launch(pointers, device, stream)
            _copy(self._program.after, pointers, stream)

    def _graph(self, pointers: Sequence[int], device: int) -> Any:
        """Captured, if it was not among the last `MAX_GRAPHS`."""
        key = tuple(pointers[which] for which in self._read)
        if key not in self._graphs:
            for launch, _ in self._program.launches:
                driver.function(launch, device)
            self._graphs[key] = driver.captured(functools.partial(self._launch, pointers, device))
            self.captures += 1
            if len(self._graphs) > MAX_GRAPHS:
                driver.forget(self._graphs.popitem(last=False)[1])
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def _launch(self, pointers: Sequence[int], device: int, stream: int) -> None:
        """The first waits for what is before it, which others would not know to wait for."""
        for place, (launch, places) in enumerate(self._program.launches):
            given = [_address(pointers, each) for each in places]
            driver.run(launch, given, stream, device, overlaps=place > 0)


def _copy(copies: tuple[Copy, ...], pointers: Sequence[int], stream: int) -> None:
    for each in copies:
        to, source = _address(pointers, each.to), _address(pointers, each.source)
        driver.copy(to, source, each.size, stream)


def _address(pointers: Sequence[int], place: Place) -> int:
    which, offset = place
    return pointers[which] + offset
