"""Starts the processes of `pruner bench`, and hears what they say."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any

from pruner_run.bench_worker import Job

WORKER = (sys.executable, "-m", "pruner_run.bench_worker")
_NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
# JAX takes what it needs, as PyTorch does, and not three quarters of the memory beforehand.
_GPU = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def events(job: Job, command: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """What a process tells of its job. Where it does not end well, the last event is "died".

    The process ends with this iterator.

    Args:
        job: its `started` is set here.
        command: that starts the process, in place of `WORKER`.
    """
    environment = os.environ | (_NO_GPU if job.device == "cpu" else _GPU)
    with tempfile.TemporaryFile() as errors:
        started = time.time()
        process = subprocess.Popen(
            WORKER if command is None else command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _send(process.stdin, dataclasses.replace(job, started=started))
            for line in process.stdout:
                if line.endswith("\n"):  # or the process died in its midst
                    yield json.loads(line)
            if status := process.wait():
                yield {"event": "died", "error": f"the process {_end(status)}{_last(errors)}"}
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def _send(stdin: IO[str], job: Job) -> None:
    """Gives a process its job; one that is dead already says so by its status."""
    try:
        with stdin:
            stdin.write(json.dumps(dataclasses.asdict(job)))
    except BrokenPipeError:
        pass


def _end(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    hint = ", as the system does where memory is short" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def _last(errors: IO[bytes]) -> str:
    """The last line of what a process complained of."""
    errors.seek(0)
    lines = [line.strip() for line in errors.read().decode(errors="replace").splitlines()]
    said = [line for line in lines if line]
    return f": {said[-1]}" if said else ""
