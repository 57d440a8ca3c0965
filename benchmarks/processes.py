"""Commands in processes of their own: how long they took, and the most memory they held."""

import contextlib
import dataclasses
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_LEFT = 2 << 30  # bytes of memory below which a process is ended, before the system ends others
_LOOK = 0.05  # seconds between two looks at it
_ROOT = Path(__file__).parents[1]  # where `python -m` finds this package


@dataclasses.dataclass(frozen=True)
class Run:
    """What a command took.

    Attributes:
        wall, user, system: seconds.
        peak: bytes of resident memory, at the most.
        load: of the machine in the minute before.
        out_of_memory: whether it was ended because the machine's memory was nearly gone.
    """

    wall: float
    user: float
    system: float
    peak: int
    load: float
    out_of_memory: bool


def run(command: Sequence[str]) -> Run:
    """Runs a command, once everything that was written before is on disk.

    Raises:
        RuntimeError: it failed.
    """
    os.sync()
    load, start = os.getloadavg()[0], time.perf_counter()
    process = subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    with process.stdout, _watched(process) as out_of_memory:
        output = process.stdout.read()
        # Of this process alone, where getrusage has the largest of all children so far. What the
        # parent holds when it starts one counts too: it has to stay small.
        _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode and not out_of_memory:
        raise RuntimeError(f"{command}: expected 0, got {process.returncode}: {output.decode()}")
    return Run(
        wall, usage.ru_utime, usage.ru_stime, usage.ru_maxrss << 10, load, bool(out_of_memory)
    )


@contextlib.contextmanager
def _watched(process: subprocess.Popen) -> Iterator[list[int]]:
    """Ends the process where it would take the memory of others; what is given then has an item."""
    ended, kills = threading.Event(), []

    def watch() -> None:
        while not ended.wait(_LOOK):
            if memory("MemAvailable") < _LEFT:
                kills.append(memory("MemAvailable"))
                process.kill()
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield kills
    finally:
        ended.set()
        watcher.join()


def memory(entry: str) -> int:
    """Bytes of an entry of /proc/meminfo."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines[entry].split()[0]) << 10
