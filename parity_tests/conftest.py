"""Precision switches of the suite; library code never touches them."""

import os
import pathlib

# Read when the frameworks start: the suite is about numbers, on the CPU unless told otherwise.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=1")

from parity_tests import record
from parity_tests.harness import BACKENDS

for backend in BACKENDS.values():
    backend.full_precision()


def pytest_sessionfinish() -> None:
    """Writes what was reached, for `python -m parity_tests.report`."""
    if path := os.environ.get("PARITY_RECORD"):
        record.write(pathlib.Path(path))
