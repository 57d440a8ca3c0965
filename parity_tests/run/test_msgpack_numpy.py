"""openpi's messages, byte for byte, and that nothing else is taken for one."""

import contextlib
import pickle
import tracemalloc

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pruner_run.msgpack_numpy import MAX_DEPTH, MessageError, pack, unpack

repeatable = settings(deadline=None, derandomize=True, database=None)

DTYPES = [*"?bhilqBHILQefd", ">f4", "<U3"]
ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0))
)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(),
    st.binary(), ARRAYS, st.floats(width=32).map(np.float32), st.booleans().map(np.bool_),
)  # fmt: skip
MESSAGES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
ARRAY = {b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f4", b"shape": [2]}


def depth(value) -> int:
    children = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth, children), default=0) if isinstance(value, dict | list) else 0


@given(MESSAGES.filter(lambda message: depth(message) <= MAX_DEPTH))
@settings(repeatable, max_examples=200)
def test_there_and_back(message):
    found = unpack(pack(message))
    assert pack(found) == pack(message)
    if isinstance(message, np.ndarray):
        assert (found.dtype, found.shape) == (message.dtype, message.shape)
        np.testing.assert_array_equal(found, message)


def test_the_bytes_are_openpis():
    state = np.arange(3, dtype=np.float32)
    assert msgpack.unpackb(pack({"state": state, "scalar": np.int16(-2)})) == {
        "state": {
            b"__ndarray__": True,
            b"data": state.tobytes(),
            b"dtype": "<f4",
            b"shape": [3],
        },
        "scalar": {b"__npgeneric__": True, b"data": -2, b"dtype": "<i2"},
    }


@given(st.binary(max_size=200))
@settings(repeatable, max_examples=500)
def test_any_bytes(data):
    """A message or a MessageError, never anything else."""
    with contextlib.suppress(MessageError):
        pack(unpack(data))


@given(
    st.fixed_dictionaries(
        {},
        optional={
            b"__ndarray__": st.just(True),
            b"__npgeneric__": st.just(True),
            b"data": LEAVES.filter(lambda leaf: not isinstance(leaf, np.ndarray | np.generic)),
            b"dtype": st.sampled_from(["<f4", "O", "|V8", "<U1", "f4,i4", "<M8[s]", "", "x"])
            | st.text(),
            b"shape": st.lists(st.integers(-(2**63), 2**63 - 1) | st.none(), max_size=12)
            | st.integers(-(2**63), 2**64 - 1),
        },
    ),
    st.integers(0, 400),
    st.integers(0, 255),
)
@settings(repeatable, max_examples=500)
def test_maps_that_look_like_arrays(found, place, byte):
    """As they are, and with a byte changed."""
    packed = bytearray(msgpack.packb({"state": found}))
    for data in (bytes(packed), bytes(packed[: place % len(packed)])):
        with_errors(data)
    packed[place % len(packed)] = byte
    with_errors(bytes(packed))


def with_errors(data: bytes) -> None:
    try:
        message = unpack(data)
    except MessageError:
        return
    if isinstance(message, dict):
        for value in message.values():
            assert not isinstance(value, np.ndarray) or value.dtype.kind in "biufU"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({b"dtype": "|O"}, "dtype: expected one of numbers or texts, got '|O'"),
        ({b"dtype": "<c8"}, "dtype: expected one of numbers"),
        ({b"dtype": "<f4,<f4"}, "dtype: expected one of numbers"),
        ({b"dtype": "<f3"}, "message: expected msgpack, got data type"),
        ({b"data": bytes(7)}, "array: expected 8 bytes for [2] of float32, got 7"),
        ({b"data": "text"}, "array: expected bytes as data, got str"),
        ({b"shape": [2**62, 2**62]}, "array: expected"),
        ({b"shape": [-2]}, "array: expected a shape of up to 8 lengths, got [-2]"),
        ({b"shape": [1] * 9}, "array: expected a shape of up to 8 lengths"),
        ({b"shape": [0, 2**62, 2**62], b"data": b""}, "expected msgpack"),
        ({b"shape": None}, "array: expected a shape"),
    ],
)
def test_arrays_that_are_none(change, found):
    with pytest.raises(MessageError) as error:
        unpack(msgpack.packb({"state": ARRAY | change}))
    assert found in str(error.value)


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ({1: 2}, "int is not allowed for map key"),
        ({b"raw": 2}, "message: expected texts as keys, got b'raw'"),
        (msgpack.ExtType(5, b"abc"), "message: expected no ExtType"),
        (msgpack.Timestamp(5), "message: expected no Timestamp"),
        ([[[[[[[[[1]]]]]]]]], "message: expected at most 8 levels, got more"),
        ([[]] * 1000, "message: expected at most 1000 maps and lists, got more"),
        ({"state": [0] * 4097}, "4097 exceeds max_array_len(4096)"),
        ({"a" * 201: 1}, "message: expected keys of up to 200 characters, got longer"),
        ({b"__npgeneric__": True, b"data": [1], b"dtype": "<i4"}, "scalar: expected a value"),
        ({b"__npgeneric__": True, b"data": 300, b"dtype": "|i1"}, "expected msgpack"),
        ({b"__npgeneric__": True, b"data": "a", b"dtype": "<f4"}, "scalar: expected a value"),
    ],
)
def test_messages_that_are_none(message, found):
    with pytest.raises(MessageError) as error:
        unpack(msgpack.packb(message))
    assert found in str(error.value)


@pytest.mark.parametrize("byte", [b"\x80", b"\x90", b"\xc0"])
@pytest.mark.parametrize("rows", [1, 4096])
def test_a_small_message_is_not_made_large(byte, rows):
    """Of maps, lists or nothing, a byte each, a message would become a hundred times its size."""
    row = b"\xdd" + (4096).to_bytes(4, "big") + byte * 4096
    data = b"\xdd" + rows.to_bytes(4, "big") + row * rows
    tracemalloc.start()
    with contextlib.suppress(MessageError):
        unpack(data)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 64 * 2**20


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", pickle.dumps({"state": 1}), b"\xdd\xff\xff\xff\xff", b"\x91" * 2000]
)
def test_bytes_that_are_none(data):
    with pytest.raises(MessageError, match="message: expected"):
        unpack(data)


@pytest.mark.parametrize("value", [np.array([None]), np.complex64(1), np.zeros(1, "V4"), object()])
def test_what_cannot_be_sent(value):
    with pytest.raises((ValueError, TypeError), match="message: expected"):
        pack({"value": value})
