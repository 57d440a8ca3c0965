"""The CUDA driver, through which what `few_rows` compiles is launched, and captured in graphs.

Everything here is about the current context, whose device a caller names.
"""

import contextlib
import ctypes
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pruner_kernels.few_rows import Launch, checked, compiled


@functools.cache
def function(launch: Launch, device: int) -> Any:
    """What is launched, loaded once a process; so not during a capture."""
    cuda = _cuda()
    name, code = compiled(launch)
    module = checked(cuda.cuModuleLoadData(code))
    found = checked(cuda.cuModuleGetFunction(module, name.encode()))
    limit = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(cuda.cuFuncSetAttribute(found, limit, launch.shared))
    return found


def run(
    launch: Launch, pointers: Sequence[int], stream: int, device: int, overlaps: bool = True
) -> None:
    """Launches on a stream.

    Args:
        launch: whose parameters are pointers.
        pointers: addresses; 0 for none.
        stream: its handle.
        device: of the stream.
        overlaps: whether it begins while what is before it on the stream still runs. Behind what
            is no such launch only `embed_actions` may, which lets no other begin before that ends:
            they ask early for what was written before the first of them.
    """
    cuda = _cuda()
    config = cuda.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
    config.blockDimX, config.blockDimY, config.blockDimZ = launch.threads, 1, 1
    config.sharedMemBytes = launch.shared
    config.hStream = stream
    if overlaps:
        attribute = cuda.CUlaunchAttribute()
        kinds = cuda.CUlaunchAttributeID
        attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
    types = (ctypes.c_void_p,) * len(pointers)
    given = tuple(pointers), types
    checked(cuda.cuLaunchKernelEx(config, function(launch, device), given, 0))


def copy(to: int, source: int, size: int, stream: int) -> None:
    """Copies bytes on the device, on a stream."""
    checked(_cuda().cuMemcpyDtoDAsync(to, source, size, stream))


@contextlib.contextmanager
def device_of(stream: int) -> Iterator[int]:
    """A stream's device; inside, its context is the current one."""
    cuda = _cuda()
    checked(cuda.cuCtxPushCurrent(checked(cuda.cuStreamGetCtx(stream))))
    try:
        yield int(checked(cuda.cuCtxGetDevice()))
    finally:
        checked(cuda.cuCtxPopCurrent())


def captured(launches: Callable[[int], None]) -> Any:
    """A CUDA graph, ready to be replayed, of what a function launches on the stream it is given."""
    cuda = _cuda()
    stream = checked(cuda.cuStreamCreate(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING))
    try:
        mode = cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        checked(cuda.cuStreamBeginCapture(stream, mode))
        try:
            launches(int(stream))
        except BaseException:
            cuda.cuStreamEndCapture(stream)  # or the stream could not be destroyed
            raise
        graph = checked(cuda.cuStreamEndCapture(stream))
        try:
            return checked(cuda.cuGraphInstantiate(graph, 0))
        finally:
            checked(cuda.cuGraphDestroy(graph))
    finally:
        checked(cuda.cuStreamDestroy(stream))


def replay(graph: Any, stream: int) -> None:
    checked(_cuda().cuGraphLaunch(graph, stream))


def forget(graph: Any) -> None:
    """Destroys a graph, once nothing runs any more: this one may."""
    checked(_cuda().cuCtxSynchronize())
    checked(_cuda().cuGraphExecDestroy(graph))


@functools.cache
def _cuda() -> Any:
    return importlib.import_module("cuda.bindings.driver")  # here, since few have it
