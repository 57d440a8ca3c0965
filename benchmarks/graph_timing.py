"""Microseconds on a GPU, of calls that a CUDA graph replays: the host has no part in them."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Call = Callable[[int], Any]  # of a layer


def error(call: Call, expected: Tensor) -> float:
    """The largest difference from float64 over the largest value; unwritten memory is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    found = call(0)
    torch.use_deterministic_algorithms(False)
    difference = (found.double().flatten() - expected.flatten()).abs().max()
    return float(difference / expected.abs().max())


def microseconds(call: Call, layers: int, replays: int = 30) -> float:
    """Of a call: the median of replays of a CUDA graph that calls once a layer."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(0)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            call(layer)
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 1e3 * statistics.median(times) / layers


def copy_speed(size: int = 1 << 30) -> float:
    """Bytes a second, read and written, of a copy on the device."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * size / microseconds(lambda _: target.copy_(source), 1) * 1e6
