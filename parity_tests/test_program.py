"""Programs of launches, by a driver that notes what it is asked for."""

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest

from pruner_kernels import driver, program
from pruner_kernels.few_rows import Launch
from pruner_kernels.program import Copy, Program


class Device:
    """A driver that notes what it is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []
        self.graphs = 0
        for name in ("function", "run", "copy", "captured", "replay", "forget"):
            monkeypatch.setattr(driver, name, getattr(self, name))
        monkeypatch.setattr(driver, "device_of", lambda stream: contextlib.nullcontext(0))

    def function(self, launch: Launch, device: int) -> None:
        self.asked.append(("function", launch.kernel))

    def run(
        self, launch: Launch, pointers: Sequence[int], stream: int, device: int, overlaps: bool
    ) -> None:
        self.asked.append(("run", launch.kernel, *pointers, stream, overlaps))

    def copy(self, *given: int) -> None:
        self.asked.append(("copy", *given))

    def captured(self, launches: Callable[[int], None]) -> int:
        launches(99)
        self.graphs += 1
        return self.graphs

    def replay(self, graph: int, stream: int) -> None:
        self.asked.append(("replay", graph, stream))

    def forget(self, graph: int) -> None:
        self.asked.append(("forget", graph))


FIRST, SECOND = (Launch(name, 1, (1, 1, 1), 16) for name in ("first", "second"))
SMALL = Program(
    ((FIRST, ((0, 0), (2, 128))), (SECOND, ((2, 128), (2, 0)))),
    before=(Copy((2, 0), (1, 0), 64),),
    after=(Copy((3, 0), (2, 0), 32),),
)
POINTERS = (1000, 2000, 3000, 4000)
COPIES = [("copy", 3000, 2000, 64, 7), ("copy", 4000, 3000, 32, 7)]


def launched(stream: int) -> list[Any]:
    return [
        ("run", "first", 1000, 3128, stream, False),  # waits for what others launched
        ("run", "second", 3128, 3000, stream, True),
    ]


def test_a_graph_is_captured_once(monkeypatch):
    """Whatever the addresses of what is copied; its functions are loaded before."""
    device, runner = Device(monkeypatch), program.Runner(SMALL)
    runner(POINTERS, lambda: 7)
    loaded = [("function", "first"), ("function", "second")]
    first, last = COPIES
    assert device.asked == [first, *loaded, *launched(99), ("replay", 1, 7), last]
    device.asked.clear()
    runner((1000, 2001, 3000, 4001), lambda: 8)
    assert [each[0] for each in device.asked] == ["copy", "replay", "copy"]
    assert runner.captures == 1


def test_without_graphs_all_is_launched_at_once(monkeypatch):
    device = Device(monkeypatch)
    runner = program.Runner(Program(SMALL.launches, SMALL.before, SMALL.after, graphs=False))
    for _ in range(2):
        device.asked.clear()
        runner(POINTERS, lambda: 7)
        first, last = COPIES
        assert device.asked == [first, *launched(7), last]
    assert runner.captures == 0


def test_graphs_are_bounded(monkeypatch):
    """The least recently used goes first."""
    device, runner = Device(monkeypatch), program.Runner(SMALL)

    def call(place: int) -> None:
        runner((place, *POINTERS[1:]), lambda: 7)

    for place in range(program.MAX_GRAPHS):
        call(place)
    call(0)
    call(program.MAX_GRAPHS)
    assert [each for each in device.asked if each[0] == "forget"] == [("forget", 2)]
    call(0)
    assert runner.captures == program.MAX_GRAPHS + 1
    call(1)
    assert runner.captures == program.MAX_GRAPHS + 2
    assert len(runner._graphs) == program.MAX_GRAPHS


def test_threads_capture_one_graph(monkeypatch):
    Device(monkeypatch)
    runner = program.Runner(SMALL)
    threads = [threading.Thread(target=runner, args=(POINTERS, lambda: 7)) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert runner.captures == 1


@pytest.fixture
def cuda(monkeypatch):
    """Of the driver, whose functions return no error and their names."""
    there = mock.MagicMock()
    for name in ("cuStreamCreate", "cuStreamEndCapture", "cuGraphInstantiate", "cuStreamGetCtx"):
        getattr(there, name).return_value = (0, name)
    there.cuStreamCreate.return_value = (0, 99)
    there.cuCtxGetDevice.return_value = (0, 3)
    for name in ("cuStreamBeginCapture", "cuGraphDestroy", "cuStreamDestroy", "cuCtxPushCurrent"):
        getattr(there, name).return_value = (0,)
    there.cuCtxPopCurrent.return_value = (0, "")
    monkeypatch.setattr(driver, "_cuda", lambda: there)
    return there


def test_a_graph_is_of_what_a_function_launches(cuda):
    launches = mock.Mock()
    assert driver.captured(launches) == "cuGraphInstantiate"
    launches.assert_called_once_with(99)
    cuda.cuGraphDestroy.assert_called_once_with("cuStreamEndCapture")
    cuda.cuStreamDestroy.assert_called_once_with(99)


def test_a_capture_that_fails_leaves_nothing(cuda):
    with pytest.raises(RuntimeError, match="no such launch"):
        driver.captured(mock.Mock(side_effect=RuntimeError("no such launch")))
    cuda.cuStreamEndCapture.assert_called_once_with(99)
    cuda.cuStreamDestroy.assert_called_once_with(99)
    cuda.cuGraphInstantiate.assert_not_called()


def test_a_streams_context_is_the_current_one_inside(cuda):
    with contextlib.suppress(ValueError), driver.device_of(7) as device:
        assert device == 3
        cuda.cuCtxPushCurrent.assert_called_once_with("cuStreamGetCtx")
        cuda.cuCtxPopCurrent.assert_not_called()
        raise ValueError
    cuda.cuCtxPopCurrent.assert_called_once_with()
