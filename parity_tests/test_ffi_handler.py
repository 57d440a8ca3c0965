"""A custom call of XLA's that Python handles, on the CPU."""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp

from parity_tests.harness import BACKENDS, DEVICE
from pruner_jax import ffi_handler

if DEVICE != "cpu" or "jax" not in BACKENDS:
    pytest.skip("computes on the CPU, in JAX", allow_module_level=True)


@pytest.fixture
def programs(monkeypatch):
    monkeypatch.setattr(ffi_handler, "programs", {})
    ffi_handler.register()
    return ffi_handler.programs


def called(name: str, *arrays: Any, shapes: Any = None) -> Any:
    shapes = jax.ShapeDtypeStruct((3,), jnp.float32) if shapes is None else shapes
    return jax.ffi.ffi_call(ffi_handler.TARGET, shapes)(*arrays, program=name)


def array(address: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_float * 3).from_address(address), np.float32)


def test_a_program_is_given_operands_and_results(programs):
    """Many, in their order; more than once in a function."""

    def summed(pointers: list[int], stream_of: Callable[[], int]) -> None:
        *given, first, second = (array(each) for each in pointers)
        first[:] = sum(place * each for place, each in enumerate(given))
        second[:] = given[-1]

    programs["summed"] = summed
    arrays = [jnp.arange(3.0) + place for place in range(260)]
    shapes = 2 * [jax.ShapeDtypeStruct((3,), jnp.float32)]

    @jax.jit
    def twice(*arrays: Any) -> Any:
        total, last = called("summed", *arrays, shapes=shapes)
        return total, *called("summed", total, last, shapes=shapes)

    expected = sum(place * np.asarray(each) for place, each in enumerate(arrays))
    total, other, last = twice(*arrays)
    np.testing.assert_array_equal(total, expected)
    np.testing.assert_array_equal(other, arrays[-1])
    np.testing.assert_array_equal(last, arrays[-1])
    np.testing.assert_array_equal(twice(*reversed(arrays))[1], arrays[0])


def test_what_a_program_raises_is_jaxs_error(programs):
    def fails(pointers: list[int], stream_of: Callable[[], int]) -> None:
        raise ValueError("expected π, got 3")

    programs |= {"fails": fails, "asks": lambda pointers, stream_of: stream_of()}
    ran = jax.jit(called, static_argnums=0)
    for name, message in [
        ("fails", "ValueError: expected π, got 3"),
        ("asks", "RuntimeError: .*not available"),  # a CPU has no stream
        ("other", "expected one of 2 programs of this process, got other"),
    ]:
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(ran(name, jnp.zeros(3)))
    unnamed = jax.ffi.ffi_call(ffi_handler.TARGET, jax.ShapeDtypeStruct((3,), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"an attribute program, got \[\]"):
        jax.block_until_ready(jax.jit(unnamed)(jnp.zeros(3)))
