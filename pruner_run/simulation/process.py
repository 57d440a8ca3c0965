"""A simulator in a process of its own: what it loads and how it ends does not touch the policy.

The process is spawned, so that it has neither JAX nor PyTorch nor an OpenGL context from its
parent. Calls go over a pipe, one at a time.
"""

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Self

import numpy as np
from jaxtyping import Float

from pruner_run.simulation.environment import (
    Environment,
    EnvironmentSpec,
    Observation,
    Step,
    make,
)

_START_SECONDS = 120.0
STEP_SECONDS = 60.0
_STOP_SECONDS = 5.0
_USERS = (ValueError, ImportError, FileNotFoundError)  # what a user did wrong


class SimulatorProcess:
    """An `Environment` that runs elsewhere.

    Attributes:
        spec: what is fixed about it.
    """

    def __init__(self, name: str, maker: Callable[[str], Environment] = make) -> None:
        """Starts it.

        Args:
            name: of the environment.
            maker: makes it, in the process; a function of a module.

        Raises:
            ValueError: there is no such environment, or its package is not installed.
            FileNotFoundError: it needs a download.
            ChildProcessError: it cannot be started.
        """
        self._name, self._maker = name, maker
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        arguments = (there, self._name, self._maker)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        there.close()
        try:
            self.spec: EnvironmentSpec = self._received(_START_SECONDS)
        except BaseException:
            self._kill()
            raise

    def reset(self, task: str, seed: int) -> Observation:
        """As an environment's. Raises a ChildProcessError where the simulator fails."""
        return self._call("reset", task, seed)

    def step(self, action: Float[np.ndarray, "A"] | None, *, observe: bool = True) -> Step:
        """As an environment's. Raises a ChildProcessError where the simulator fails."""
        return self._call("step", action, observe=observe)

    def restart(self) -> None:
        """Ends the process, whatever it does, and starts another. Errors as at the start."""
        self._pipe.close()
        self._kill()
        self._start()

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()  # upon which it ends by itself
        self._process.join(_STOP_SECONDS)
        self._kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        try:
            self._pipe.send((method, arguments, options))
        except OSError:
            raise self._ended() from None
        return self._received(STEP_SECONDS)

    def _received(self, seconds: float) -> Any:
        try:
            if not self._pipe.poll(seconds):
                self._kill()
                raise ChildProcessError(
                    f"{self._name}: the simulator did not answer in {seconds:g} s"
                )
            error, value = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise self._ended() from None
        if error is None:
            return value
        raise error(f"{self._name}: {value}" if error is ChildProcessError else value)

    def _ended(self) -> ChildProcessError:
        self._process.join(_STOP_SECONDS)
        code = self._process.exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"status {code}"
        return ChildProcessError(f"{self._name}: the simulator's process ended with {how}")

    def _kill(self) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join()


def _serve(pipe: Connection, name: str, maker: Callable[[str], Environment]) -> None:
    """Answers calls until the pipe is closed: an error's class and text, or None and the result."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent closes the pipe
    environment: Environment | None = None
    try:
        environment = maker(name)
        pipe.send((None, environment.spec))
        while True:
            method, arguments, options = pipe.recv()
            pipe.send((None, getattr(environment, method)(*arguments, **options)))
    except (EOFError, ConnectionError):
        pass
    except _USERS as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        pipe.send((kind, str(error)))
    except Exception as error:
        traceback.print_exc()
        pipe.send((ChildProcessError, f"{type(error).__name__}: {error}"))
    finally:
        if environment is not None:
            environment.close()
