"""A handler of XLA's foreign function interface that is written in Python.

A custom call to `TARGET` names a program, a function that is given the addresses of operands and
results, and a stream: it may enqueue there what XLA has no way to ask for. A call costs the host
5 µs, and 0.15 for a buffer.

The structures are those of `xla/ffi/api/c_api.h`, as far as they are read, of version 0.3 on; what
later versions add stands behind them.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import jax

TARGET = "pruner_program"
MAJOR_VERSION = 0
PLATFORMS = ("cpu", "CUDA")
EXECUTE = 3  # of the stages
METADATA = 1  # of the extensions
INTERNAL = 13  # of the codes of errors

# Given addresses of operands, then results, and what gives the stream's handle.
Program = Callable[[list[int], Callable[[], int]], None]

programs: dict[str, Program] = {}  # by the name that a call gives, its attribute `program`


@functools.cache
def register() -> None:
    """Tells XLA of the handler; once a process, before a program that calls it is compiled."""
    for platform in PLATFORMS:
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(_handle), platform=platform)


def _structure(*fields: tuple[str, Any]) -> type[Any]:
    """As each of them starts: with its size, and with extensions."""
    common = [("struct_size", ctypes.c_size_t), ("extension", ctypes.c_void_p)]
    return type("_Structure", (ctypes.Structure,), {"_fields_": [*common, *fields]})


_Version = _structure(("major", ctypes.c_int), ("minor", ctypes.c_int))
_Api = _structure(
    ("version", _Version),
    ("internal", ctypes.c_void_p),
    ("create_error", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)),
    ("get_message", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
    ("destroy_error", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
    ("register_handler", ctypes.c_void_p),
    ("get_stream", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)),
)
_Buffers = _structure(
    ("count", ctypes.c_int64), ("types", ctypes.c_void_p), ("buffers", ctypes.c_void_p)
)
_Attributes = _structure(
    ("count", ctypes.c_int64),
    ("types", ctypes.c_void_p),
    ("names", ctypes.c_void_p),
    ("values", ctypes.c_void_p),
)
_Call = _structure(
    ("api", ctypes.POINTER(_Api)),
    ("context", ctypes.c_void_p),
    ("stage", ctypes.c_int),
    ("operands", _Buffers),
    ("results", _Buffers),
    ("attributes", _Attributes),
)
_Buffer = _structure(("dtype", ctypes.c_int), ("data", ctypes.c_void_p))
_NewError = _structure(("message", ctypes.c_char_p), ("code", ctypes.c_int))
# The code is one of version 0.4; before, it is not written.
_Message = _structure(
    ("error", ctypes.c_void_p), ("message", ctypes.c_char_p), ("code", ctypes.c_int)
)
_Error = _structure(("error", ctypes.c_void_p))
_Stream = _structure(("context", ctypes.c_void_p), ("stream", ctypes.c_void_p))


class _Span(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("size", ctypes.c_size_t)]


class _Metadata(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("version", _Version),
        ("traits", ctypes.c_uint32),
    ]


class _Extension(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("kind", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("metadata", ctypes.POINTER(_Metadata)),
    ]


_DATA = _Buffer.data.offset


@ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
def _handle(address: int) -> int | None:
    """What XLA calls; the error, if there is one. No exception may leave it."""
    call = _Call.from_address(address)
    try:
        if call.extension and _Extension.from_address(call.extension).kind == METADATA:
            _describe(call)
        elif call.stage == EXECUTE:
            _execute(call)
    except BaseException as error:
        message = f"{type(error).__name__}: {error}".encode()
        given = _NewError(ctypes.sizeof(_NewError), None, message, INTERNAL)
        return call.api.contents.create_error(ctypes.addressof(given))
    return None


def _describe(call: Any) -> None:
    """Says which version this handler is of; it has no traits, so that no XLA graph holds it.

    Raises:
        RuntimeError: XLA's is another major version.
    """
    extension, version = _Extension.from_address(call.extension), call.api.contents.version
    if version.major != MAJOR_VERSION:
        expected = f"expected version {MAJOR_VERSION} of XLA's FFI"
        raise RuntimeError(f"{expected}, got {version.major}.{version.minor}")
    metadata = extension.metadata.contents
    metadata.version.major, metadata.version.minor = version.major, version.minor
    metadata.traits = 0


def _execute(call: Any) -> None:
    name = _attribute(call.attributes, "program")
    if name not in programs:
        raise LookupError(f"expected one of {len(programs)} programs of this process, got {name}")
    programs[name](_addresses(call.operands) + _addresses(call.results), lambda: _stream(call))


def _addresses(given: Any) -> list[int]:
    """Where buffers lie; 0 for those without memory."""
    if not given.count:
        return []
    buffers = (ctypes.c_size_t * given.count).from_address(given.buffers)
    at = ctypes.c_size_t.from_address
    return [at(buffer + _DATA).value for buffer in buffers]


def _attribute(given: Any, name: str) -> str:
    """A string's value."""
    names, values = (
        (ctypes.POINTER(_Span) * given.count).from_address(spans) if given.count else ()
        for spans in (given.names, given.values)
    )
    texts = {_text(key): value for key, value in zip(names, values, strict=True)}
    if name not in texts:
        raise ValueError(f"expected an attribute {name}, got {sorted(texts)}")
    return _text(texts[name])


def _text(span: Any) -> str:
    return ctypes.string_at(span.contents.start, span.contents.size).decode()


def _stream(call: Any) -> int:
    """The handle of XLA's stream.

    Raises:
        RuntimeError: the platform has none.
    """
    api = call.api.contents
    given = _Stream(ctypes.sizeof(_Stream), None, call.context, None)
    error = api.get_stream(ctypes.addressof(given))
    if not error:
        return given.stream or 0
    found = _Message(ctypes.sizeof(_Message), None, error, None, 0)
    api.get_message(ctypes.addressof(found))
    message = found.message.decode(errors="replace")
    gone = _Error(ctypes.sizeof(_Error), None, error)
    api.destroy_error(ctypes.addressof(gone))
    raise RuntimeError(message)
