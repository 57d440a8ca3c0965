"""What converting a checkpoint takes, beside copying it and beside today's way.

`python -m benchmarks.convert_checkpoint --folder /big/disk --size full` writes a π0.5 of random
weights there, in the two storages that openpi's checkpoints have, and converts it there and back,
every time in a process of its own. Each repetition has every step once, so that what else the
machine does meets all of them. 55 GB of disk and 16 GB of memory are needed, and half an hour.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks import big_checkpoints, convert_report
from benchmarks.processes import Run, memory, run

_RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("numpy", "ml_dtypes", "tensorstore", "zstandard", "safetensors", "orbax-checkpoint")
_TORCH = "safetensors"  # the source of the way back
_PRECISIONS = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures the converter.

    Attributes:
        folder: where the checkpoints are written; they are removed at the end.
        size: full is π0.5's own, 3.35 billion numbers; small is for trying the benchmark.
        repetitions: of every step.
        output: the file of results; benchmarks/results/convert_<date>.json if not given.
        markdown: a page to write the results to.
    """

    folder: Path
    size: Literal["full", "small"] = "full"
    repetitions: int = 2
    output: Path | None = None
    markdown: Path | None = None


@dataclasses.dataclass(frozen=True)
class Step:
    """Something that is measured.

    Attributes:
        source: the folder that is read: a storage, or the safetensors.
        name: copy, start, whole tree, or the precision that is converted to.
        command: gives what is run, from the source and the output.
    """

    source: str
    name: str
    command: Sequence[str]


def main(options: Options) -> None:
    """Measures, prints and writes."""
    work = options.folder.absolute() / "convert_benchmark"
    work.mkdir(parents=True)
    try:
        written = _write_checkpoints(work, options.size)
        runs = list(_runs(work, options))
        found = _described(work, options, written) | {"runs": runs}
    finally:
        shutil.rmtree(work)
    path = options.output or _RESULTS / f"convert_{found['date'][:10]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    page = convert_report.page(found)
    print(page)
    if options.markdown is not None:
        options.markdown.write_text(page)


def _write_checkpoints(work: Path, size: str) -> dict[str, int]:
    """The sources of all steps; gives their bytes on disk."""
    _say(f"writing checkpoints into {work}")
    for command in (
        _python("-m", "benchmarks.big_checkpoints", work, size),
        _conversion("jax_model_to_pytorch", work / "chunked", work / _TORCH, "float32"),
    ):
        if run(command).out_of_memory:
            raise RuntimeError(f"{command}: expected memory for it, got none left")
    sources = (*big_checkpoints.STORAGES, _TORCH)
    return {source: big_checkpoints.bytes_in(work / source) for source in sources}


def _runs(work: Path, options: Options) -> Iterator[dict[str, Any]]:
    """Every step, again and again; in every other repetition from the last to the first."""
    output = work / "output"
    for repetition in range(options.repetitions):
        steps = list(_steps(work, output, options.size))
        for step in steps if repetition % 2 == 0 else reversed(steps):
            measured = run(step.command)
            if output.exists():
                shutil.rmtree(output)
            _say(f"{repetition + 1} {step.source:12} {step.name:22} {_short(measured)}")
            yield {
                "source": step.source,
                "step": step.name,
                "repetition": repetition,
                **dataclasses.asdict(measured),
            }


def _steps(work: Path, output: Path, size: str) -> Iterator[Step]:
    for storage in big_checkpoints.STORAGES:
        source = work / storage
        yield Step(storage, "copy", ["cp", "-r", str(source), str(output)])
        yield Step(storage, "start", _inspection(source))
        for precision in _PRECISIONS:
            command = _conversion("jax_model_to_pytorch", source, output, precision)
            yield Step(storage, precision, command)
        for precision in _whole_tree_precisions(size):
            command = _python("-m", "benchmarks.whole_tree", source, output, size, precision)
            yield Step(storage, f"whole tree, {precision}", command)
    yield Step(_TORCH, "copy", ["cp", "-r", str(work / _TORCH), str(output)])
    for precision in _PRECISIONS:
        command = _conversion("pytorch_model_to_jax", work / _TORCH, output, precision)
        yield Step(_TORCH, precision, command)


def _whole_tree_precisions(size: str) -> tuple[str, ...]:
    """In float32 the tree and what is read of it at a time take more than twice its size."""
    tree = 4 * big_checkpoints.count(size)
    return _PRECISIONS if memory("MemTotal") > 2.5 * tree else ("bfloat16",)


def _conversion(direction: str, source: Path, output: Path, precision: str) -> list[str]:
    """The command as a user gives it."""
    command = f"from convert.cli import convert_{direction} as main; main()"
    folders = ("--checkpoint_dir", source, "--output_path", output)
    return _python("-c", command, *folders, "--precision", precision)


def _inspection(source: Path) -> list[str]:
    command = "from convert.cli import convert_jax_model_to_pytorch as main; main()"
    return _python("-c", command, "--checkpoint_dir", source, "--inspect_only")


def _python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def _described(work: Path, options: Options, written: dict[str, int]) -> dict[str, Any]:
    size = options.size
    return {
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
        "command": "python -m benchmarks.convert_checkpoint --folder FOLDER "
        f"--size {size} --repetitions {options.repetitions}",
        "size": size,
        "parameters": big_checkpoints.count(size),
        "bytes": written,
        "compression": big_checkpoints.compression(written, size),
        "largest": {
            "whole": big_checkpoints.largest_chunk("whole", size),
            "chunked": big_checkpoints.largest_chunk("chunked", size),
            _TORCH: big_checkpoints.largest_tensor(size),
        },
        "machine": {
            "cores": os.cpu_count(),
            "memory": memory("MemTotal"),
            "disk": _disk(work),
            "system": f"{platform.system()} {platform.release().split('-')[0]}",
        },
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _disk(folder: Path) -> str:
    """The file system and the kind of disk that a folder is on."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    above = [mount for mount in mounts if folder.resolve().is_relative_to(mount[1])]
    device, _, kind = max(above, key=lambda mount: len(mount[1]))[:3]
    if device.startswith("/dev/vd"):
        return f"{kind} on a virtual disk"
    rotates = Path("/sys/block", Path(device).name.rstrip("0123456789"), "queue/rotational")
    if not rotates.exists():
        return kind
    return f"{kind} on a {'rotating' if int(rotates.read_text()) else 'solid-state'} disk"


def _short(measured: Run) -> str:
    cpu = measured.user + measured.system
    end = ", ended: no memory left" if measured.out_of_memory else ""
    return f"{measured.wall:7.1f} s, {cpu:6.1f} s of CPU, {measured.peak / 2**30:5.2f} GiB{end}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
