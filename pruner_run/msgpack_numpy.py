"""openpi's messages: msgpack, and in it NumPy's arrays and scalars as small maps.

An array is {b"__ndarray__": True, b"data", b"dtype", b"shape"}, a scalar {b"__npgeneric__": True,
b"data", b"dtype"}. What comes from a network is believed in nothing: an array has a plain dtype and
exactly the bytes that its shape needs, and nothing is ever unpickled. A map or a list of a byte
becomes some hundred in Python, so that their number and lengths are limited too.
"""

import itertools
import math
import re
import reprlib
from typing import Any

import msgpack
import numpy as np

MAX_DEPTH = 8  # of maps and lists in each other
MAX_NESTED = 1000  # maps and lists in a message, arrays and scalars among them
MAX_LENGTH = 4096  # of a map or a list
MAX_KEY = 200  # characters
_MAX_DIMENSIONS = 8

# Booleans, integers, floats and texts, of any byte order.
_DTYPE = re.compile(r"[<>|=]?[biufU][1-9]\d{0,6}")


class MessageError(ValueError):
    """Bytes that are no message."""


def pack(message: Any) -> bytes:
    """A message's bytes.

    Raises:
        TypeError, ValueError: something in it cannot be sent, such as an array of objects.
    """
    packed = msgpack.packb(message, default=_packable)
    assert packed is not None
    return packed


def unpack(data: bytes) -> Any:
    """The message in some bytes; its arrays are views of them, which cannot be written to.

    Raises:
        MessageError: they hold something else, or more than a robot has to say.
    """
    numbers = itertools.count(1)

    def counted(found: Any) -> Any:
        if next(numbers) > MAX_NESTED:
            raise MessageError(f"message: expected at most {MAX_NESTED} maps and lists, got more")
        return _unpacked(found) if isinstance(found, dict) else found

    limits = {"max_map_len": MAX_LENGTH, "max_array_len": MAX_LENGTH}
    try:
        message = msgpack.unpackb(data, object_hook=counted, list_hook=counted, **limits)
        _check(message, MAX_DEPTH)
    except MessageError:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        found = str(error)[:80] or type(error).__name__
        raise MessageError(f"message: expected msgpack, got {found}") from error
    return message


def _packable(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "VOc":
        raise ValueError(f"message: expected arrays of numbers or texts, got {value.dtype}")
    if isinstance(value, np.ndarray):
        described = {b"dtype": value.dtype.str, b"shape": value.shape}
        return {b"__ndarray__": True, b"data": value.tobytes(), **described}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"message: expected what msgpack knows, got {type(value).__name__}")


def _unpacked(found: dict[Any, Any]) -> Any:
    if b"__ndarray__" in found:
        return _array(found)
    if b"__npgeneric__" in found:
        return _scalar(found)
    return found


def _array(found: dict[Any, Any]) -> np.ndarray:
    data, shape, dtype = found.get(b"data"), found.get(b"shape"), _dtype(found)
    if not isinstance(data, bytes):
        raise MessageError(f"array: expected bytes as data, got {type(data).__name__}")
    if (
        not isinstance(shape, list)
        or len(shape) > _MAX_DIMENSIONS
        or not all(type(length) is int and length >= 0 for length in shape)
    ):
        raise MessageError(
            f"array: expected a shape of up to {_MAX_DIMENSIONS} lengths, got {reprlib.repr(shape)}"
        )
    if (expected := math.prod(shape) * dtype.itemsize) != len(data):
        raise MessageError(
            f"array: expected {expected} bytes for {shape} of {dtype}, got {len(data)}"
        )
    return np.ndarray(shape=shape, dtype=dtype, buffer=data)


def _scalar(found: dict[Any, Any]) -> np.generic:
    dtype, value = _dtype(found), found.get(b"data")
    if not isinstance(value, bool | int | float | str) or isinstance(value, str) != (
        dtype.kind == "U"
    ):
        raise MessageError(f"scalar: expected a value of {dtype}, got {type(value).__name__}")
    return dtype.type(value)


def _dtype(found: dict[Any, Any]) -> np.dtype:
    name = found.get(b"dtype")
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        raise MessageError(f"dtype: expected one of numbers or texts, got {reprlib.repr(name)}")
    return np.dtype(name)


def _check(value: Any, depth: int) -> None:
    """Raises a MessageError for what no observation holds, or too deep a nest."""
    if isinstance(value, dict | list):
        if not depth:
            raise MessageError(f"message: expected at most {MAX_DEPTH} levels, got more")
        if isinstance(value, dict) and (other := [key for key in value if type(key) is not str]):
            raise MessageError(f"message: expected texts as keys, got {reprlib.repr(other[0])}")
        if isinstance(value, dict) and any(len(key) > MAX_KEY for key in value):
            raise MessageError(f"message: expected keys of up to {MAX_KEY} characters, got longer")
        for each in value.values() if isinstance(value, dict) else value:
            _check(each, depth - 1)
    elif not isinstance(value, bool | int | float | str | bytes | np.ndarray | np.generic | None):
        raise MessageError(f"message: expected no {type(value).__name__}, got one")
