"""Precision switches of the suite; library code never touches them."""

import ctypes
import gc
import itertools
import os
import pathlib
import sys
import tempfile

import pytest

# Read when the frameworks start: the suite is about numbers, on the CPU unless told otherwise.
os.environ.setdefault("JAX_PLATFORMS", os.environ.get("PARITY_DEVICE", "cpu"))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# A second thread gains a small model little, and costs it much where the cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What one process has compiled the others need not: workers, and the processes that tests start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="parity_tests-jax-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

from parity_tests import record
from parity_tests.harness import BACKENDS

for backend in BACKENDS.values():
    backend.full_precision()

_finished = itertools.count(1)


@pytest.fixture(autouse=True)
def _forget_compiled_functions(request):
    """Compiled functions of hundreds of tests would fill the memory of a small machine."""
    yield
    if "compile_fast" not in request.fixturenames and next(_finished) % 20 == 0:
        _forget()


def _forget() -> None:
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    if "torch" in sys.modules:
        sys.modules["torch"].compiler.reset()
    gc.collect()
    # What was freed in small pieces the C library keeps: gigabytes, after some hundred tests.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


@pytest.fixture(scope="module")
def compile_fast():
    """A step compiles for half a minute; what XLA does not optimize it computes all the same.

    What such a module compiles, a few large functions that many tests call, is kept to its end. The
    processes that it starts do the same.
    """
    with pytest.MonkeyPatch.context() as patch:
        if "jax" in BACKENDS:
            import jax

            patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
            jax.config.update("jax_disable_most_optimizations", True)
        yield
        if "jax" in BACKENDS:
            jax.config.update("jax_disable_most_optimizations", False)
    _forget()


def pytest_sessionfinish() -> None:
    """Writes what was reached, for `python -m parity_tests.report`."""
    if path := os.environ.get("PARITY_RECORD"):
        record.write(pathlib.Path(path) / f"{os.getpid()}.json")
