"""Precision switches of the suite; library code never touches them."""

import os
import pathlib

# Read when the frameworks start: the suite is about numbers, on the CPU unless told otherwise.
os.environ.setdefault("JAX_PLATFORMS", os.environ.get("PARITY_DEVICE", "cpu"))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# A second thread gains a small model little, and costs it much where the cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from parity_tests import record
from parity_tests.harness import BACKENDS

for backend in BACKENDS.values():
    backend.full_precision()


def pytest_sessionfinish() -> None:
    """Writes what was reached, for `python -m parity_tests.report`."""
    if path := os.environ.get("PARITY_RECORD"):
        record.write(pathlib.Path(path) / f"{os.getpid()}.json")
