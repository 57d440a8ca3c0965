"""Precision switches of the suite; library code never touches them."""

import gc
import itertools
import os
import pathlib
import sys

import pytest

# Read when the frameworks start: the suite is about numbers, on the CPU unless told otherwise.
os.environ.setdefault("JAX_PLATFORMS", os.environ.get("PARITY_DEVICE", "cpu"))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# A second thread gains a small model little, and costs it much where the cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from parity_tests import record
from parity_tests.harness import BACKENDS

for backend in BACKENDS.values():
    backend.full_precision()

_finished = itertools.count(1)


@pytest.fixture(autouse=True)
def _forget_compiled_functions():
    """Compiled functions of hundreds of tests would fill the memory of a small machine."""
    yield
    if "jax" in sys.modules and next(_finished) % 20 == 0:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def compile_fast():
    """A step compiles for half a minute; what XLA does not optimize it computes all the same."""
    if "jax" in BACKENDS:
        import jax

        jax.config.update("jax_disable_most_optimizations", True)
    yield
    if "jax" in BACKENDS:
        jax.config.update("jax_disable_most_optimizations", False)


def pytest_sessionfinish() -> None:
    """Writes what was reached, for `python -m parity_tests.report`."""
    if path := os.environ.get("PARITY_RECORD"):
        record.write(pathlib.Path(path) / f"{os.getpid()}.json")
