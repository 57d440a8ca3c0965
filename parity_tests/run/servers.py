"""A server on loopback in a thread or a process, and a policy that costs nothing.

`python -m parity_tests.run.servers DELAY MAX_BATCH` prints a port and serves it there until it is
terminated.
"""

import asyncio
import contextlib
import pathlib
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pruner_run.server import PolicyServer, ServedPolicy, ServerSettings

ROOT = pathlib.Path(__file__).parents[2]
HORIZON, ACTION_DIM = 5, 3


class EchoPolicy:
    """Its actions are the marker in the observation, as many as the observation asks for.

    Attributes:
        delay: seconds that it takes for a batch.
        batches: the markers of each batch, in order.
        gate: a batch waits until it is set.
        entered: is set when a batch comes.
    """

    def __init__(self, delay: float = 0.0) -> None:
        self.metadata: dict[str, Any] = {
            "config": "echo",
            "backend": "none",
            "cameras": ["image/base_0_rgb"],
            "state": {"state": ACTION_DIM},
            "stages_ms": {"vision": 1.0, "pruning": 0.1, "prefix": 1.0, "denoising": 2.0},
        }
        self.delay, self.batches = delay, []
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()

    def prepare(self, observation: Mapping[str, Any]) -> tuple[float, int]:
        if "marker" not in observation:
            raise ValueError(f"marker: expected one, got {sorted(observation)}")
        return float(observation["marker"]), int(observation.get("horizon", HORIZON))

    def act(self, prepared: Sequence[tuple[float, int]]) -> list[dict[str, Any]]:
        self.entered.set()
        self.gate.wait()
        time.sleep(self.delay)
        self.batches.append([marker for marker, _ in prepared])
        if any(marker < 0 for marker, _ in prepared):
            raise RuntimeError("a secret of the server's")
        return [
            {
                "actions": np.full((horizon, ACTION_DIM), marker),
                "policy_timing": {"infer_ms": 0.0},
                "pruning": {"kept": {"base_0_rgb": 4}, "kept_total": 4, "patches": 16},
            }
            for marker, horizon in prepared
        ]


class Listening:
    """A server that listens at a port of loopback."""

    port: int

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def get(self, path: str, headers: Mapping[str, str] = {}) -> str:
        """The body of a plain HTTP answer."""
        request = urllib.request.Request(f"http://{self.address}{path}", headers=dict(headers))
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.read().decode()

    def metric(self, name: str) -> float:
        """A value that the server's metrics have now, by name and labels."""
        lines = dict(line.rsplit(" ", 1) for line in self.get("/metrics").splitlines())
        return float(lines[name])


class RunningServer(Listening):
    """A server in a thread, that can be told to stop."""

    def __init__(self, server: PolicyServer) -> None:
        self._server, self._started = server, threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        assert self._started.wait(10)
        self.port = server.port

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._server.run(self._stop, self._started.set)

    def tell_to_stop(self) -> None:
        if self._thread.is_alive() and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended in between
                self._loop.call_soon_threadsafe(self._stop.set)

    def stop(self) -> None:
        """Returns when it has ended."""
        self.tell_to_stop()
        self._thread.join(60)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def serving(policy: ServedPolicy, **settings: Any) -> Iterator[RunningServer]:
    """A server of a policy, at a free port of loopback unless told otherwise."""
    running = RunningServer(PolicyServer(policy, ServerSettings(**({"port": 0} | settings))))
    try:
        yield running
    finally:
        running.stop()


class ServerProcess(Listening):
    """A server of an `EchoPolicy` in a process of its own."""

    def __init__(self, delay: float, max_batch: int) -> None:
        command = [sys.executable, "-m", "parity_tests.run.servers", str(delay), str(max_batch)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        assert self._process.wait(60) == 0


async def main() -> None:
    """Serves until it is terminated."""
    delay, max_batch = float(sys.argv[1]), int(sys.argv[2])
    settings = ServerSettings(port=0, max_batch=max_batch)
    server, stop = PolicyServer(EchoPolicy(delay), settings), asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await server.run(stop, lambda: print(server.port, flush=True))


if __name__ == "__main__":
    asyncio.run(main())
