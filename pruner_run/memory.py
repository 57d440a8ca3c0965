"""The most memory that this process held on the host."""

import contextlib
import resource
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_FORGET_PEAK = "5"  # proc(5)


def resident_peak() -> int:
    """Bytes, since `clear_resident_peak`, or since the process began where there is no /proc."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def clear_resident_peak() -> None:
    """Begins to count anew, where the system can."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text(_FORGET_PEAK)
