"""The converter's benchmark as a page, from its results."""

import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_MOST_TIME = 2.0  # times copying the same bytes
_MOST_MEMORY = 1.25, 1 << 30  # times the largest stored piece, and bytes more
_LEAST_SAVED = 3.0  # times less memory than the whole tree takes

_HEAD = ("from", "to", "seconds", "× copying", "CPU s", "peak GiB", "allowed", "goals")
_TITLES = {
    "whole": "JAX, whole arrays",
    "chunked": "JAX, eight chunks",
    "safetensors": "safetensors, float32",
}


def page(found: Mapping[str, Any]) -> str:
    """Markdown."""
    machine, gib = found["machine"], 2**30
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    sizes = ", ".join(
        f"{_TITLES[source]} {size / 1e9:.1f} GB" for source, size in found["bytes"].items()
    )
    return "\n".join(
        [
            f"`{found['command']}`, {found['date'].replace('T', ' ')}: "
            f"{found['parameters'] / 1e9:.2f} billion random numbers in float32, "
            f"on {machine['cores']} CPU cores with {machine['memory'] / gib:.0f} GiB, "
            f"{machine['disk']}, {machine['system']}. {versions}.",
            "",
            f"On disk: {sizes}. The machine's load before a step was "
            f"{_spread([run['load'] for run in found['runs']])}.",
            "",
            *_table(found),
            "",
        ]
    )


def _table(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"| {' | '.join(_HEAD)} |"
    yield "|---" * len(_HEAD) + "|"
    for source in _TITLES:
        steps = dict.fromkeys(run["step"] for run in found["runs"] if run["source"] == source)
        for step in steps:
            yield f"| {' | '.join(_line(found, source, step))} |"


def _line(found: Mapping[str, Any], source: str, step: str) -> list[str]:
    runs = _runs(found, source, step)
    peak = max(run["peak"] for run in runs)
    seconds = [run["wall"] for run in runs]
    times = _times_copying(found, source, step)
    is_conversion = step in ("float32", "bfloat16") and found["size"] == "full"
    allowed = f"{allowed_memory(found, source) / 2**30:.2f}" if is_conversion else ""
    failed = any(run["out_of_memory"] for run in runs)
    return [
        _TITLES[source],
        {"copy": "`cp -r`", "start": "`--inspect_only`"}.get(step, step),
        "ended: no memory left" if failed else f"{_median(seconds)} ({_each(seconds)})",
        "" if step in ("copy", "start") else f"{_median(times)} ({_each(times)})",
        f"{statistics.median(run['user'] + run['system'] for run in runs):.0f}",
        f"{peak / 2**30:.2f}",
        allowed,
        ", ".join(_verdicts(found, source, step)) if is_conversion else "",
    ]


def _verdicts(found: Mapping[str, Any], source: str, step: str) -> Iterator[str]:
    for name, is_met in goals(found, source, step).items():
        yield f"{name}: {'met' if is_met else '**missed**'}"


def goals(found: Mapping[str, Any], source: str, step: str) -> dict[str, bool]:
    """Which goals a conversion meets."""
    runs = _runs(found, source, step)
    peak = max(run["peak"] for run in runs)
    met = {
        "memory": peak <= allowed_memory(found, source),
        "time": statistics.median(_times_copying(found, source, step)) <= _MOST_TIME,
    }
    whole_tree = _runs(found, source, f"whole tree, {step}")
    if whole_tree:
        theirs = min(run["peak"] for run in whole_tree)
        if source == "chunked":
            met["a third of the whole tree's memory"] = theirs >= _LEAST_SAVED * peak
        seconds, their_seconds = (
            statistics.median(run["wall"] for run in each) for each in (runs, whole_tree)
        )
        met["not slower than the whole tree"] = seconds <= their_seconds or any(
            run["out_of_memory"] for run in whole_tree
        )
    return met


def allowed_memory(found: Mapping[str, Any], source: str) -> float:
    """Bytes that a conversion may take."""
    factor, more = _MOST_MEMORY
    return factor * found["largest"][source] + more


def _times_copying(found: Mapping[str, Any], source: str, step: str) -> list[float]:
    """Each against the copy in the same repetition."""
    copies = {run["repetition"]: run["wall"] for run in _runs(found, source, "copy")}
    return [run["wall"] / copies[run["repetition"]] for run in _runs(found, source, step)]


def _runs(found: Mapping[str, Any], source: str, step: str) -> list[dict[str, Any]]:
    return [run for run in found["runs"] if (run["source"], run["step"]) == (source, step)]


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.1f}"


def _each(values: list[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


def _spread(values: list[float]) -> str:
    return f"{min(values):.1f} to {max(values):.1f}"


if __name__ == "__main__":
    import json

    print(page(json.loads(Path(sys.argv[1]).read_text())))
